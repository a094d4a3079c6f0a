"""Matrix products of 16-bit matrices on processors that have no instructions for them.

There PyTorch's products in bfloat16 take 10 times as long as in float32, and 50 times where the second factor is not
transposed. A product of two bfloat16 numbers is exact in float32, in which sums are kept anyway: so the factors are
widened and multiplied. LoRA's layers round the result, as the instructions do where there are any; attention and the
head keep it in float32 up to their own end. Layers without LoRA are PyTorch's, and as slow as ever.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

# Known of x86 alone; of another processor PyTorch does not tell.
EMULATED = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype to multiply matrices of `dtype` in, on a kind of device."""
    return torch.float32 if EMULATED and (device, dtype) == ("cpu", torch.bfloat16) else dtype


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b, or bias + a b, in the dtype of `a`; a (n, k), b (k, m), bias (m,)."""
    if (wide := product_dtype(a.dtype, a.device.type)) == a.dtype:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    whole = a.to(wide) @ b.to(wide)
    return (whole if bias is None else whole.add_(bias)).to(a.dtype)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `out` (n, m) in place, rounded once, and return it."""
    if (wide := product_dtype(a.dtype, a.device.type)) == a.dtype:
        return out.addmm_(a, b)
    return out.add_(a.to(wide) @ b.to(wide))
