"""Means over pairs, gathered on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor


class PairMeans:
    """Sums per-pair metrics of any number of batches; `read` gives their means and starts anew."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.pairs = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add tensors of shape (B,), one value a pair, the same names each time."""
        names = list(metrics)
        assert self.sums is None or names == self.names, "metrics of one meter must not change"
        stacked = torch.stack([metrics[name].detach().float() for name in names])
        total = stacked.sum(1, dtype=torch.float64)
        self.names, self.sums = names, total if self.sums is None else self.sums + total
        self.pairs += stacked.shape[1]

    def read(self, prefix: str) -> dict[str, float]:
        """Return the means over the pairs of all ranks, the only device sync; {} if nothing was added."""
        if self.sums is None:
            return {}
        totals = torch.cat([self.sums, self.sums.new_tensor([self.pairs])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        *sums, pairs = totals.tolist()
        names = self.names
        self.__init__()
        return {f"{prefix}/{name}": value / pairs for name, value in zip(names, sums, strict=True)}
