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
    """Row numbers of one forward pass, and how many pairs its whole optimizer step averages over.

    One that is not `counted` is run because the other ranks run one, and goes into no mean and no gradient.
    """

    rows: tuple[int, ...]
    step_pairs: int
    counted: bool = True


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
        counted=micro.counted,
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


def deal(rows: Sequence[int], tokens_N: np.ndarray, slots: int, batch_size: int) -> list[tuple[int, ...]]:
    """Deal a step's rows out to forward passes of at most `batch_size` pairs and of like numbers of tokens.

    The longest first, each to the emptiest pass that has room; within a pass they keep their order. A pass that
    gets no row stays empty.

    >>> deal([7, 2, 5, 0], np.array([10, 0, 20, 0, 0, 30, 0, 40]), 2, 2)
    [(7, 0), (2, 5)]
    """
    if slots == 1:
        return [tuple(rows)]
    dealt: list[list[int]] = [[] for _ in range(slots)]
    load = [0] * slots
    for at in sorted(range(len(rows)), key=lambda at: -int(tokens_N[rows[at]])):
        slot = min((s for s in range(slots) if len(dealt[s]) < batch_size), key=lambda s: load[s])
        dealt[slot].append(at)
        load[slot] += int(tokens_N[rows[at]])
    return [tuple(rows[at] for at in sorted(slot)) for slot in dealt]


class TrainingOrder(Sampler[MicroBatch]):
    """One rank's micro-batches of an epoch, the same number on every rank and in every step. Lightning sets the epoch.

    Where a last step has fewer pairs than forward passes, those that are left over repeat a pair that does not count:
    sharded models run in lock-step, and DeepSpeed counts micro-batches. `tokens_N` are the lengths that are balanced.
    `skip` = (epoch, pairs) leaves out an epoch's first pairs, which a resumed run has seen; the length counts them.
    """

    def __init__(
        self,
        tokens_N: np.ndarray,
        batch_size: int,
        accumulate: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
    ):
        self.tokens_N, self.batch_size, self.accumulate = tokens_N, batch_size, accumulate
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.epoch = 0
        self.skip: tuple[int, int] = (0, 0)

    @property
    def step_pairs(self) -> int:
        """Return the pairs of a whole optimizer step, those of all ranks."""
        return self.batch_size * self.accumulate * self.world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.tokens_N) // self.step_pairs) * self.accumulate

    def rows(self, epoch: int) -> np.ndarray:
        """Return the row numbers in the order of an epoch, those of all ranks."""
        if not self.shuffle:
            return np.arange(len(self.tokens_N))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens_N))

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self.rows(self.epoch)
        first = self.skip[1] if self.epoch == self.skip[0] else 0
        for start in range(first, len(order), self.step_pairs):
            step = order[start : start + self.step_pairs].tolist()
            shortest = min(step, key=lambda row: int(self.tokens_N[row]))
            dealt = deal(step, self.tokens_N, self.accumulate * self.world, self.batch_size)
            for rows in dealt[self.rank :: self.world]:
                yield MicroBatch(rows or (shortest,), len(step), counted=bool(rows))


def limited(batches: int, limit: float) -> int:
    """Return how many of an epoch's batches are gone through: a number of them, or a share, as Lightning takes it.

    >>> limited(10, 3), limited(10, 1), limited(10, 1.0), limited(10, 0.25)
    (3, 1, 10, 2)
    """
    return min(limit, batches) if isinstance(limit, int) else int(batches * limit)


def of_like_length(lengths: np.ndarray, batch_size: int) -> list[tuple[int, ...]]:
    """Return all rows in batches of neighbours in length, from the shortest to the longest.

    >>> of_like_length(np.array([5, 1, 5, 3, 2]), 2)
    [(1, 4), (3, 0), (2,)]
    """
    order = np.argsort(lengths, kind="stable")
    return [tuple(order[at : at + batch_size].tolist()) for at in range(0, len(order), batch_size)]


class ValidationOrder(Sampler[MicroBatch]):
    """One rank's share of the validation pairs, batches of like length in a random order: each pair counts once.

    The order is the same in every epoch and run and for any number of ranks, and random so that a limit on the
    batches takes a fair sample of the lengths. Every rank has the same number of batches; one that is left over
    repeats the first and does not count.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, rank: int = 0, world: int = 1):
        alike = of_like_length(lengths, batch_size)
        batches = [MicroBatch(alike[at], len(lengths)) for at in np.random.default_rng(0).permutation(len(alike))]
        batches += [batch._replace(counted=False) for batch in batches[:1]] * (-len(batches) % world)
        self.batches = batches[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.batches)
