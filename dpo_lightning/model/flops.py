"""The arithmetic that a pair needs at the least, to hold a step's time against; docs/performance.md derives it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo_lightning.model.logps import base_of, text_of
from dpo_lightning.model.products import product

PEAK_SECONDS = 0.3  # a processor has slow moments: it is shared with others, or its clock has yet to rise
PEAK_SHARE = 0.005  # of the training's time may go into timing products again
PEAK_PRODUCTS = 4  # at the least, or it is not worth while


@dataclass(frozen=True)
class PairFlops:
    """Floating-point operations of pairs, a multiply-add as two, every token through the trunk once.

    Args:
        trunk, adapter, head: weights in the matrix products of each; an adapter on the head is left out.
        attention: layers x heads x size of a head.

    """

    trunk: int
    adapter: int
    head: int
    attention: int

    @classmethod
    def of(cls, policy: Any) -> PairFlops | None:
        """Count a policy's weights; None where experts share the tokens, or a recurrence stands for attention."""
        base = base_of(policy)
        config, parts = base.config.get_text_config(), list(text_of(base).named_modules())
        heads = getattr(config, "num_attention_heads", None)
        if not heads or any("expert" in f"{name} {type(part).__name__}".lower() for name, part in parts):
            return None
        sizes = [
            ("lora_" in name, getattr(part.weight, "ds_numel", part.weight.numel()))
            for name, part in parts
            if isinstance(part, nn.Linear | Conv1D)
        ]
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            trunk=sum(size for added, size in sizes if not added),
            adapter=sum(size for added, size in sizes if added),
            head=config.vocab_size * config.hidden_size,
            attention=config.num_hidden_layers * heads * width,
        )

    def step(self, lengths_B3: Tensor, with_reference: bool) -> float:
        """Return the operations of a training step on pairs of these lengths, without any recomputation."""
        prompt, chosen, rejected = lengths_B3.double().unbind(1)
        tokens = (prompt + chosen + rejected).sum().item()
        scored = (chosen + rejected).sum().item()
        seen = ((prompt + chosen) ** 2 + (prompt + rejected) ** 2 - prompt**2).sum().item()
        passes = 2 if self.adapter else 3  # forward, gradient of the inputs, gradient of trained weights
        trunk = tokens * (self.trunk * (passes + with_reference) + 3 * self.adapter)
        return 2 * (
            trunk + scored * self.head * (passes + with_reference) + seen * self.attention * (3 + with_reference)
        )


class MatmulPeak:
    """The operations a second that a device reaches on one large matrix product, the best of many.

    A processor that is shared with others changes its speed by a third within minutes, so that an interval of the
    training is held against products that are timed before it and after it: as near as PEAK_SHARE allows. A GPU
    keeps its speed: there the first measurement serves all.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.operations = 2 * (n := 8192 if device.type == "cuda" else 1024) ** 3
        # Random, as a GPU multiplies constants faster; by a generator of its own, as a metric must not change a run.
        matrix = torch.randn(n, n, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
        self.fastest = _fastest(matrix, PEAK_SECONDS)  # seconds of a product
        self.matrix = matrix if device.type == "cpu" else None
        self.due = 0.0  # seconds that may go into the next measurement

    def over(self, seconds: float) -> float:
        """Return the peak beside the interval of this many seconds that has just ended; cheap, or 0.5 % of the time."""
        self.due += PEAK_SHARE * seconds
        before = self.fastest
        if self.matrix is not None and self.due >= PEAK_PRODUCTS * before:
            self.fastest = _fastest(self.matrix, min(self.due, PEAK_SECONDS))
            self.due = 0.0
        return self.operations / min(before, self.fastest)


def _fastest(matrix: Tensor, budget: float) -> float:
    """Return the seconds of the fastest of `matrix`' squares, as many as take `budget` seconds, two at the least."""
    end = time.perf_counter() + budget
    seconds: list[float] = []
    while len(seconds) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        product(matrix, matrix)
        if matrix.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
