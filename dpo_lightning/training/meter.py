"""Means over pairs, gathered on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lightning.cluster.ranks import over_ranks


class PairMeans:
    """Sums per-pair metrics of any number of batches; `read` gives their means and starts anew."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.pairs = 0

    def add(self, metrics: dict[str, Tensor], counted: bool = True) -> None:
        """Add tensors of shape (B,), one value a pair, the same names each time; not counted, only the names."""
        names = list(metrics)
        assert self.sums is None or names == self.names, "metrics of one meter must not change"
        stacked = torch.stack([metrics[name].detach().float() for name in names])
        total = stacked.sum(1, dtype=torch.float64) if counted else stacked.new_zeros(len(names), dtype=torch.float64)
        self.names, self.sums = names, total if self.sums is None else self.sums + total
        self.pairs += stacked.shape[1] if counted else 0

    def read(self, prefix: str) -> dict[str, float]:
        """Return the means over the pairs of all ranks, the only device sync; {} if nothing was added.

        Collective: every rank must have been given the same number of batches.
        """
        if self.sums is None:
            return {}
        *sums, pairs = over_ranks(self.state(), self.sums.device)
        names = self.names
        self.__init__()
        return {f"{prefix}/{name}": value / pairs for name, value in zip(names, sums, strict=True)} if pairs else {}

    def state(self) -> Tensor:
        """Return the sums and the number of pairs, a vector; empty where nothing was added."""
        if self.sums is None:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([self.sums, self.sums.new_tensor([self.pairs])])

    def load(self, names: list[str], state: Tensor) -> None:
        """Go on from sums that were saved under these names."""
        self.__init__()
        if len(state):
            self.names, self.sums, self.pairs = names, state[:-1].clone(), int(state[-1])
