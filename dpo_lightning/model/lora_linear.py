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


class AddedProduct(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, for x (T, in), W (out, in), A (r, in), B (out, r); W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:  # fmt: skip
        """Keep x and x A^T, which is r wide."""
        low = x @ a.T
        scaled = b * scaling
        out = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        ctx.save_for_backward(x, low, weight, a, scaled)
        ctx.scaling = scaling
        return out.addmm_(low, scaled.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, A and B."""
        x, low, weight, a, scaled = ctx.saved_tensors
        grad_low = grad @ scaled
        grad_x = (grad @ weight).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.T @ x, (grad.T @ low).mul_(ctx.scaling), None


class LoraLinear(Linear):
    """PEFT's linear layer with `AddedProduct` for its forward pass, wherever that is all there is to compute."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base and adapter's sum; x (..., in) -> (..., out)."""
        base: Any = self.base_layer
        name = self.active_adapters[0] if self.active_adapters else ""
        if args or kwargs or not self._is_plain(base, name):
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        adapter: Any = self.lora_A[name], self.lora_B[name]
        a, b = (layer.weight.to(dtype) for layer in adapter)
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        with torch.autocast(kind, enabled=False):
            out = AddedProduct.apply(rows, base.weight.to(dtype), bias, a, b, self.scaling[name])
        return out.view(*x.shape[:-1], -1)

    def _is_plain(self, base: Any, name: str) -> bool:
        """Return whether nothing but one adapter is added, on a frozen weight that lies here whole."""
        return (
            type(base) is nn.Linear
            and not any(p.requires_grad for p in base.parameters())
            and not hasattr(base.weight, "ds_id")  # ZeRO-3 gathers it for its own module's forward alone
            and not self.disable_adapters
            and not self.merged
            and len(self.active_adapters) == 1
            and name in self.lora_A
            and name not in self.lora_variant
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
        )
