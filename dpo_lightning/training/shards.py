"""The whole of what ZeRO has sharded: trained weights and Adam's moments, gathered and given back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shards:
    """One rank's view of an engine's sharded parameters. Every method is collective.

    Args:
        engine: DeepSpeed's.
        groups: the parameters that train, as those of the optimizer that was given to it.

    """

    def __init__(self, engine: Any, groups: Sequence[Sequence[nn.Parameter]]):
        self.engine, self.parameters = engine, [p for group in groups for p in group]
        ends = list(itertools.accumulate((len(group) for group in groups), initial=0))
        self.places = [list(range(a, b)) for a, b in itertools.pairwise(ends)]

    @property
    def zero(self) -> Any:
        """Return DeepSpeed's optimizer, which holds this rank's part."""
        return self.engine.optimizer

    def weights(self, keep: bool) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield parameter and whole float32 value on the CPU; nothing unless `keep`, though all must ask."""
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.parameters:
            whole: Any = safe_get_full_fp32_param(parameter)
            if keep:
                yield parameter, whole.cpu().clone()

    def optimizer_state(self, keep: bool) -> dict[str, Any]:
        """Return the state_dict that torch's AdamW would have, or {} unless `keep`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.zero.optimizer.state:  # no step has been applied
            self._make_states(torch.tensor(0.0))
        self._link()
        states = {}
        for i, parameter in enumerate(self.parameters):
            whole: Any = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if keep:
                states[i] = {key: value.cpu().clone() for key, value in whole.items()}
                states[i]["step"] = self._flat_states()[0]["step"].cpu().clone()
        groups = [{**g, "params": places} for g, places in zip(self.zero.param_groups, self.places, strict=True)]
        return {"state": states, "param_groups": groups} if keep else {}

    def load_weights(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Set the float32 weights, and those in the precision of the computation that are made of them."""
        for parameter, value in values:
            self._set(parameter, value)
        self._refresh()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Set moments, number of steps and the groups' settings, from `optimizer_state` or torch's AdamW."""
        self._make_states(state["state"][0]["step"])
        for i, parameter in enumerate(self.parameters):
            for key in MOMENTS:
                self._set(parameter, state["state"][i][key], key)
        for group, saved in zip(self.zero.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}

    def _set(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Give this rank its part of a weight, or of the moment `key`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.engine.zero_optimization_stage() == 3:
            # DeepSpeed's own setter fails where the ranks do not divide the weight: the last part is padded
            part, _ = self.zero._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            start = self.zero._get_param_partition_rank(parameter) * part.numel()
            own = whole.flatten()[start : start + part.numel()]
            part.detach().zero_()[: own.numel()].copy_(own)
        elif key is None:
            safe_set_full_fp32_param(parameter, whole.to(self.engine.device))
        else:
            safe_set_full_optimizer_state(parameter, whole.to(self.engine.device), key)

    def _make_states(self, step: Tensor) -> None:
        """Do what the first step does: give this rank's part of each group its moments."""
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            # the fused kernel reads the step where the weights are
            self.zero.optimizer.state[flat] = {"step": step.to(flat.device, torch.float32, copy=True), **zeros}
        self._link()

    def _link(self) -> None:
        """Let DeepSpeed find the moments of every group: it looks once, when the first group alone has any."""
        if self.engine.zero_optimization_stage() < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[Tensor]:
        zero = self.zero
        if self.engine.zero_optimization_stage() < 3:
            return zero.single_partition_of_fp32_groups
        return zero.fp32_partitioned_groups_flat

    def _flat_states(self) -> list[dict[str, Any]]:
        return [self.zero.optimizer.state[flat] for flat in self._flats()]

    def _refresh(self) -> None:
        """Round the float32 weights into those that compute."""
        zero = self.zero
        if self.engine.zero_optimization_stage() < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
