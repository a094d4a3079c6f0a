"""Which pairs make up which optimizer step, and the Batch they become.

The plan of an epoch is a function of seed, epoch and the number of pairs alone, never of devices or workers: a
step is a set of pairs, and ranks and micro-batches only deal it out among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dpo_lightning.types import Batch


class MicroBatch(NamedTuple):
    """Row numbers of one forward pass, and how many pairs its whole optimizer step averages over."""

    rows: tuple[int, ...]
    step_pairs: int


class PairTable(Dataset[Batch]):
    """The tokenised pairs; indexed by a MicroBatch it gives the Batch.

    `reference_N2` holds the reference's log-probabilities of each row, where they are known.
    """

    def __init__(self, table: Any):
        self.table = table
        self.reference_N2: np.ndarray | None = None

    def __getitem__(self, micro: MicroBatch) -> Batch:
        batch = collate([self.table[row] for row in micro.rows], micro)
        if self.reference_N2 is not None:
            batch.reference_B2 = self.reference_N2[list(micro.rows)]
            assert not np.isnan(batch.reference_B2).any(), "a row that `PreferenceData.rows_ahead` did not foresee"
        return batch

    def __len__(self) -> int:
        return len(self.table)


def collate(pairs: Sequence[dict[str, Sequence[int]]], micro: MicroBatch) -> Batch:
    """Lay pairs end to end.

    >>> pairs = [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5]}, {"prompt": [6], "chosen": [7], "rejected": [8]}]
    >>> batch = collate(pairs, MicroBatch((9, 4), 2))
    >>> batch.ids_T.tolist(), batch.lengths_B3.tolist(), batch.rows_B.tolist()
    ([1, 2, 3, 4, 5, 6, 7, 8], [[2, 1, 2], [1, 1, 1]], [9, 4])
    """
    parts = [[pair["prompt"], pair["chosen"], pair["rejected"]] for pair in pairs]
    return Batch(
        ids_T=torch.tensor([i for row in parts for ids in row for i in ids], dtype=torch.int64),
        lengths_B3=torch.tensor([[len(ids) for ids in row] for row in parts]),
        rows_B=torch.tensor(micro.rows),
        step_pairs=micro.step_pairs,
        opening=opening_of([pair["prompt"] for pair in pairs]),
    )


def opening_of(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common, leaving each its last token.

    >>> opening_of([[1, 2, 3, 4], [1, 2, 5]]), opening_of([[1, 2]]), opening_of([[1, 2], [1, 2]])
    (2, 0, 1)
    """
    if len(prompts) == 1:
        return 0
    most = min(len(prompt) for prompt in prompts) - 1
    first, rest = prompts[0], prompts[1:]
    return next((i for i in range(most) if any(prompt[i] != first[i] for prompt in rest)), most)


class TrainingOrder(Sampler[MicroBatch]):
    """One rank's micro-batches of an epoch. Lightning sets the epoch.

    `skip` = (epoch, pairs) leaves out an epoch's first pairs, which a resumed run has seen; the length counts them.
    """

    def __init__(
        self,
        pairs: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
    ):
        self.pairs, self.batch_size, self.accumulate = pairs, batch_size, accumulate
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.epoch = 0
        self.skip: tuple[int, int] = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.pairs, self.batch_size * self.accumulate * self.world)
        return whole * self.accumulate + (-(-rest // self.batch_size) if self.world == 1 else 0)

    def rows(self, epoch: int) -> np.ndarray:
        """Return the row numbers in the order of an epoch, those of all ranks."""
        if not self.shuffle:
            return np.arange(self.pairs)
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs)

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self.rows(self.epoch)
        per_step = self.batch_size * self.accumulate * self.world
        first = self.skip[1] if self.epoch == self.skip[0] else 0
        for start in range(first, self.pairs, per_step):
            step = order[start : start + per_step]
            if len(step) < per_step and self.world > 1:
                return  # ranks must take part in the same number of steps
            for at in range(self.rank * self.batch_size, len(step), self.batch_size * self.world):
                yield MicroBatch(tuple(step[at : at + self.batch_size].tolist()), len(step))


class ValidationOrder(Sampler[MicroBatch]):
    """One rank's share of the validation pairs, each pair once, neighbours of like length."""

    def __init__(self, lengths: np.ndarray, batch_size: int, rank: int = 0, world: int = 1):
        order = np.argsort(lengths, kind="stable")
        starts = range(rank * batch_size, len(order), batch_size * world)
        self.batches = [MicroBatch(tuple(order[a : a + batch_size].tolist()), len(lengths)) for a in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.batches)
