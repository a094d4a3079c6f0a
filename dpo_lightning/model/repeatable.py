"""Attention on GPUs whose backward pass gives the same bits each time it is run.

PyTorch's fused kernels add up the gradient of queries in whatever order their blocks come to it, unless told to be
deterministic: by `torch.use_deterministic_algorithms(True)`, not by its `warn_only=True`, under which they only warn.
The former stops a training at an operation that has no deterministic form. So in a training that only warns
attention alone is told, where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WARNS = 1  # torch's number for the mode "warn"


def repeatable(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attend(q, k, v), differentiable to the same bits each time where the training asks for it."""
    warns = torch.get_deterministic_debug_mode() == WARNS
    return DeterministicBackward.apply(attend, q, k, v) if warns else attend(q, k, v)


class DeterministicBackward(torch.autograd.Function):
    """Attention whose backward pass computes it again, by deterministic kernels, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the inputs."""
        ctx.attend = attend
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of queries, keys and values."""
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad(), deterministic():
            return None, *torch.autograd.grad(ctx.attend(*leaves), leaves, grad)


@contextmanager
def deterministic() -> Iterator[None]:
    """Have PyTorch compute deterministically or fail: the whole process, whose other threads wait for autograd's."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
