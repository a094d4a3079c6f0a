"""A linear layer with its adapter in one piece: fewer passes over the activations, and each input kept once.

PEFT computes base(x) + scaling B(A(x)) as separate operations, with a float32 copy of x and three more tensors of
the output's size, all of them kept or walked through. Here the adapter's share is added into the base's output by
the matrix product itself; the backward pass does the same for the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from dpo_lightning.model.products import add_product_, product


class AddedProduct(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, for x (T, in), W (out, in), A (r, in), B (out, r); W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:  # fmt: skip
        """Keep x and x A^T, which is r wide."""
        low = product(x, a.T)
        scaled = b * scaling
        out = product(x, weight.T, bias)
        ctx.save_for_backward(x, low, weight, a, scaled)
        ctx.scaling = scaling
        return add_product_(out, low, scaled.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, A and B."""
        x, low, weight, a, scaled = ctx.saved_tensors
        grad_low = product(grad, scaled)
        grad_x = add_product_(product(grad, weight), grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, product(grad_low.T, x), product(grad.T, low).mul_(ctx.scaling), None


class LoraLinear(Linear):
    """PEFT's linear layer with `AddedProduct` for its forward pass, wherever that is all there is to compute."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # a layer of GPT-2's before this one has PEFT transpose all that follow

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base and adapter's sum, or the base's output where adapters are off; x (..., in) -> (..., out)."""
        base: Any = self.base_layer
        name = self.active_adapters[0] if self.active_adapters else ""
        if args or kwargs or self.merged or not self._is_frozen_whole(base):
            return super().forward(x, *args, **kwargs)
        if not self.disable_adapters and not self._is_plain(name):
            return super().forward(x)
        kind = x.device.type
        dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        with torch.autocast(kind, enabled=False):
            if self.disable_adapters:
                out = product(rows, weight.T, bias)
            else:
                a, b = (layer[name].weight.to(dtype) for layer in (self.lora_A, self.lora_B))
                out = AddedProduct.apply(rows, weight, bias, a, b, self.scaling[name])
        return out.view(*x.shape[:-1], out.shape[-1])

    def _is_frozen_whole(self, base: Any) -> bool:
        """Return whether the base is a plain frozen layer whose weight lies here."""
        return (
            type(base) is nn.Linear
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
            and not hasattr(base.weight, "ds_id")  # ZeRO-3 gathers it for its own module's forward alone
        )

    def _is_plain(self, name: str) -> bool:
        """Return whether nothing but one adapter is added."""
        return (
            len(self.active_adapters) == 1
            and name in self.lora_A
            and name not in self.lora_variant
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
        )
