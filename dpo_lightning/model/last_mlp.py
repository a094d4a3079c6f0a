"""The last layer's MLP on the rows that are read: what it would make of the other rows, nobody looks at.

Attention needs the keys of all tokens in every layer, but after the last layer's attention only rows that predict a
completion token go on, and an MLP works row by row. Of a row of HH's tokens more than half are prompt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ReadRows:
    """Stands before the forward functions of one layer's attention and MLP.

    Attention finds `read_R` (R,) among its keywords and the MLP, which comes after it, works on these rows. Where
    there are none, as in the padded layout, all is as ever. Attention is called within the layer's forward function:
    so the rows are right when activation checkpointing calls that again, whatever batch has come between. No hooks,
    as the layer's own do not run then, and ZeRO has all of them removed before a validation.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module):
        self.read_R: Tensor | None = None
        self.attention, self.mlp = attention.forward, mlp.forward
        attention.forward, mlp.forward = self.attend, self.multiply

    def attend(self, *args: Any, read_R: Tensor | None = None, **kwargs: Any) -> Any:
        """Attend as ever, and note the rows."""
        self.read_R = read_R
        return self.attention(*args, **kwargs)

    def multiply(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the rows of (1, T, H) that are read, among zeros: the residual adds nothing to those that are not."""
        if self.read_R is None:
            return self.mlp(*args, **kwargs)
        (x,) = args
        rows, self.read_R = self.read_R, None
        return x.new_zeros(x.shape).index_copy(1, rows, self.mlp(x.index_select(1, rows)).to(x.dtype))


def install(trunk: Any) -> None:
    """Let the trunk's last MLP heed `read_R`, once; experts, and layers whose parts go by other names, never will."""
    if hasattr(trunk, "dpo_read_rows") or not isinstance(getattr(trunk, "layers", None), nn.ModuleList):
        return
    layer: Any = trunk.layers[-1]
    if hasattr(layer, "self_attn") and hasattr(getattr(layer, "mlp", None), "down_proj"):
        trunk.dpo_read_rows = ReadRows(layer.self_attn, layer.mlp)
