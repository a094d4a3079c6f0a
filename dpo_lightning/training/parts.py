"""A forward pass that does not fit into a device's memory is made again in smaller parts, with the same numbers.

All ranks split alike, so that they stay in step. A part's activations are computed again in the backward pass, so that
one part's are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dpo_lightning.cluster import points
from dpo_lightning.cluster.exits import TooLarge
from dpo_lightning.cluster.ranks import Words
from dpo_lightning.types import Batch, PairLogps

Score = Callable[[Batch], PairLogps]
NO_PARTS = 2  # a rank's word: out of memory with a single pair; 1: with several, 0: not at all


class Parts:
    """Scores batches in as many parts as were found to fit; `count` doubles when a device runs out of memory."""

    def __init__(self) -> None:
        self.count = 1
        self._words = Words()

    def score(self, trainer: Any, batch: Batch, policy: Score, reference: Score) -> tuple[PairLogps, PairLogps]:
        """Return what `policy` and `reference` give for the batch; the reference goes first, on an empty memory.

        Under ZeRO-3 a rank that fails leaves the others waiting within their forward pass: there it is not tried
        again. Raises TooLarge with the remedy where a single pair does not fit.
        """
        while True:
            random = _random_states()
            try:
                scores, failed = self._in_parts(batch, policy, reference), ""
            except torch.OutOfMemoryError as error:
                if getattr(trainer.strategy, "zero_stage_3", False):
                    raise
                scores, failed = None, str(error).splitlines()[0]
            points.at("forward.end")  # from here on a rank waits for the others
            own = NO_PARTS if failed and self.count >= len(batch) else bool(failed)
            if not (worst := self._words.highest(own)):
                assert scores is not None
                return scores
            if worst == NO_PARTS:
                raise TooLarge(f"a single pair does not fit into the device's memory ({failed or 'on another rank'}); "
                               "use a smaller data.max_length, or model.gradient_checkpointing=true")  # fmt: skip
            scores = None
            torch.set_rng_state(random[0])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(random[1])
                torch.cuda.empty_cache()
            self.count *= 2
            trainer.lightning_module.print(
                f"out of memory at step {trainer.global_step + 1}: forward passes are made in {self.count} parts from "
                f"here on; with a smaller data.batch_size and more trainer.accumulate_grad_batches, none is made twice"
            )

    def _in_parts(self, batch: Batch, policy: Score, reference: Score) -> tuple[PairLogps, PairLogps]:
        if self.count == 1:
            fixed = reference(batch)
            return policy(batch), fixed
        parts = split(batch, self.count)
        fixed = _joined([reference(part) for part in parts])
        return _joined([checkpoint(policy, part, use_reentrant=False) for part in parts]), fixed


def _random_states() -> list[torch.Tensor]:
    """Return the state of the host's random numbers, and of the device's where there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def split(batch: Batch, count: int) -> list[Batch]:
    """Return the batch's pairs in at most `count` batches of like numbers of pairs, in their order."""
    tokens_B = batch.lengths_B3.sum(1)
    ends = [round(len(batch) * (number + 1) / count) for number in range(count)]
    parts, first, token = [], 0, 0
    for last in ends:
        if last == first:
            continue
        length = int(tokens_B[first:last].sum())
        parts.append(replace(
            batch, ids_T=batch.ids_T[token : token + length], lengths_B3=batch.lengths_B3[first:last],
            rows_B=batch.rows_B[first:last],
            opening=batch.opening if last - first > 1 else 0,
            reference_B2=None if batch.reference_B2 is None else batch.reference_B2[first:last],
        ))  # fmt: skip
        first, token = last, token + length
    return parts


def _joined(parts: Any) -> PairLogps:
    return PairLogps(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
