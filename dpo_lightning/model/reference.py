"""The frozen reference: the policy with its adapter off, a second frozen model, or what either gave before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from dpo_lightning.model.layout import set_layout
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.model.lora import adapter_off
from dpo_lightning.types import Batch, PairLogps, UserError


class AdapterOff(nn.Module):
    """The policy's own base: no second model in memory."""

    name = "adapter_off"

    def set_layout(self, layout: str) -> None:
        """Do nothing: the policy's layout is the reference's."""

    @torch.no_grad()
    def pair_logps(self, policy: Any, batch: Batch) -> PairLogps:
        """Return the batch's log-probabilities under the policy without its adapter."""
        with adapter_off(policy):
            return pair_logps(policy, batch)

    def generator(self, policy: Any) -> tuple[Any, Any]:
        """Return the model that generates the reference's answers, and the context it does so in."""
        return policy, adapter_off(policy)


class FrozenCopy(nn.Module):
    """A second model with the weights that the policy started from."""

    name = "frozen_copy"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()

    def set_layout(self, layout: str) -> None:
        """Score the frozen model in the policy's layout, so that both round alike."""
        set_layout(self.model, layout)

    @torch.no_grad()
    def pair_logps(self, policy: Any, batch: Batch) -> PairLogps:
        """Return the batch's log-probabilities under the frozen model."""
        return pair_logps(self.model, batch)

    def generator(self, policy: Any) -> tuple[Any, Any]:
        """Return the model that generates the reference's answers, and the context it does so in."""
        return self.model, torch.no_grad()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)


class Offloaded(FrozenCopy):
    """A frozen copy whose weights stay in the host's memory, and visit the device while they score.

    They do so before the policy's activations are there: the device holds both models' weights, or the policy's and
    its activations, never all three. Each forward pass costs their transfer.
    """

    def __init__(self, model: nn.Module):
        nn.Module.__init__(self)
        object.__setattr__(self, "model", model.requires_grad_(False).eval())  # no submodule: nothing else moves it
        self.model.cpu()
        self._apply(lambda tensor: tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Offloaded:
        """Take a dtype with the policy, but not a device; buffers stay as they are."""
        for p in self.model.parameters():
            p.data = _pinned(p.data.to(fn(p.data.new_empty(0)).dtype))
        return self

    def cast(self, dtype: torch.dtype) -> None:
        """Store the parameters in `dtype`."""
        self._apply(lambda tensor: tensor.to(dtype))

    @torch.no_grad()
    def pair_logps(self, policy: Any, batch: Batch) -> PairLogps:
        """Return the batch's log-probabilities under the frozen model, on the batch's device."""
        with visiting(self.model, batch.ids_T.device):
            return super().pair_logps(policy, batch)

    def generator(self, policy: Any) -> tuple[Any, Any]:
        """Return the model that generates the reference's answers, and the context it does so in."""
        return self.model, visiting(self.model, policy.device)


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor where a GPU copies it from at full speed."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


@contextmanager
def visiting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a frozen model's tensors on a device for as long as the context lasts."""
    tensors = [*model.parameters(), *model.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


class Itself:
    """A policy without adapter before its first update: its weights are the reference's."""

    @torch.no_grad()
    def pair_logps(self, policy: Any, batch: Batch) -> PairLogps:
        """Return the batch's log-probabilities under the policy."""
        return pair_logps(policy, batch)


class Cached:
    """Log-probabilities that the batches bring with them; `live` is what computes those that are missing.

    `load` gives a second model; None where the policy's adapter can be turned off.
    """

    name = "cached"

    def __init__(self, load: Callable[[], nn.Module] | None):
        self.load, self.layout = load, "padded"

    def set_layout(self, layout: str) -> None:
        """Compute what is missing in the policy's layout."""
        self.layout = layout

    def live(self, device: torch.device, itself: bool = False) -> AdapterOff | FrozenCopy | Itself:
        """Return the reference that computes; a second model, where that is one, is not kept.

        `itself`: the policy has not been trained, so that it can stand in for a second model.
        """
        if itself and self.load is not None:
            return Itself()
        reference = AdapterOff() if self.load is None else FrozenCopy(self.load()).to(device)
        reference.set_layout(self.layout)
        return reference

    def pair_logps(self, policy: Any, batch: Batch) -> PairLogps:
        """Return what the batch holds."""
        assert batch.reference_B2 is not None, "training/reference_cache.py gives every row its log-probabilities"
        logps_B2 = torch.from_numpy(batch.reference_B2).to(batch.ids_T.device)
        tokens_B2 = batch.lengths_B3[:, 1:].to(logps_B2)
        return PairLogps(*logps_B2.unbind(1), *tokens_B2.unbind(1))

    def generator(self, policy: Any) -> tuple[Any, Any]:
        """Return the model that generates the reference's answers, and the context it does so in."""
        reference = self.live(policy.device)
        assert not isinstance(reference, Itself)
        return reference.generator(policy)


def build_reference(
    policy: nn.Module, load: Callable[[], nn.Module], *, mode: str, offload: bool = False
) -> AdapterOff | FrozenCopy | Cached:  # fmt: skip
    """Return the reference of `policy`; `load` gives a second model. auto: adapter_off where there is an adapter.

    offload: keep a frozen copy in the host's memory.
    """
    if mode == "cached":
        return Cached(None if isinstance(policy, PeftModel) else load)
    has_adapter = isinstance(policy, PeftModel)
    if mode == "adapter_off" and not has_adapter:
        raise UserError("reference=adapter_off needs an adapter: use lora=r16 or reference=frozen_copy")
    if mode == "adapter_off" or (mode == "auto" and has_adapter):
        return AdapterOff()
    if offload:
        with torch.device("cpu"):
            return Offloaded(load())
    return FrozenCopy(load())
