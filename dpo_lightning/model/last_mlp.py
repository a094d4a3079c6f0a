"""The last layer's MLP on the rows that are read: what it would make of the other rows, nobody looks at.

Attention needs the keys of all tokens in every layer, but after the last layer's attention only rows that predict a
completion token go on, and an MLP works row by row. Of a row of HH's tokens more than half are prompt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ReadRows:
    """Hooks of one layer's attention and MLP; without `read_R` among attention's keywords they change nothing.

    Attention is called within the layer, as the layer's own hooks are not where activation checkpointing computes it
    again: the rows are right there, too, whatever batch has come between.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module):
        self.read_R: Tensor | None = None
        self.rows = 0
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        mlp.register_forward_pre_hook(self._select)
        mlp.register_forward_hook(self._spread)

    def _enter(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.read_R = kwargs.get("read_R")

    def _select(self, mlp: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Take the rows out of (1, T, H)."""
        if self.read_R is None:
            return None
        self.rows = args[0].shape[1]
        return args[0].index_select(1, self.read_R), *args[1:]

    def _spread(self, mlp: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """Put the rows back among zeros: the residual connection adds nothing to rows that are not read."""
        if self.read_R is None:
            return None
        return out.new_zeros(out.shape[0], self.rows, out.shape[2]).index_copy(1, self.read_R, out)


def install(trunk: Any) -> None:
    """Let the trunk's last MLP heed `read_R`, once; experts, and layers whose parts go by other names, never will."""
    if hasattr(trunk, "dpo_read_rows") or not isinstance(getattr(trunk, "layers", None), nn.ModuleList):
        return
    layer: Any = trunk.layers[-1]
    if hasattr(layer, "self_attn") and hasattr(getattr(layer, "mlp", None), "down_proj"):
        trunk.dpo_read_rows = ReadRows(layer.self_attn, layer.mlp)
