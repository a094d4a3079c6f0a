"""No update is made whose loss or gradient is not finite on any rank: the run stops and names the pairs."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.cluster.exits import WrongNumbers
from dpo_lightning.cluster.ranks import gather_texts, over_ranks
from dpo_lightning.types import Batch

MOST_TOLD = 16  # pairs


class FiniteGuard:
    """Collects the losses of a step's micro-batches and judges them before the update, all ranks together."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.losses: list[Tensor] = []
        self.counted: list[bool] = []

    def begin(self, batch: Batch) -> None:
        """Know which pairs the next forward pass has, should it fail."""
        self.rows.append(batch.rows_B.tolist())
        self.counted.append(batch.counted)

    def add(self, loss_B: Tensor) -> None:
        """Take the losses of the micro-batch that was begun, shape (B,)."""
        self.losses.append(loss_B.detach())

    def check(self, trainer: Any, norm: Tensor | float | None = None) -> float:
        """Return the mean loss of the step's pairs over all ranks.

        Raises WrongNumbers on every rank if a loss of this step, or the norm of its gradient, is not finite; the
        weights are what they were before the step. Collective, and the one device sync of the guard.
        """
        values = torch.cat(self.losses)
        bad = ~values.isfinite().all()
        if norm is not None:
            bad = bad | ~torch.as_tensor(norm, device=values.device).isfinite()
        counted = torch.cat([losses for losses, counts in zip(self.losses, self.counted, strict=True) if counts] or
                            [values[:0]])  # fmt: skip
        sums = torch.stack([bad.double(), counted.double().sum(), bad.new_tensor(len(counted), dtype=torch.float64)])
        any_bad, loss, pairs = over_ranks(sums, values.device)
        if any_bad:
            self.stop(trainer, "a loss or the gradient")
        return loss / pairs

    def stop(self, trainer: Any, what: str) -> None:
        """Raise WrongNumbers with the pairs whose loss is not finite, or else all pairs of the step. Collective."""
        own = [
            {"micro-batch": number + 1, "pair": row, "loss": loss}
            for number, (rows, losses) in enumerate(zip(self.rows, self.losses, strict=True))
            for row, loss in zip(rows, losses.tolist(), strict=True)
        ]
        told = []
        texts = gather_texts(json.dumps(own), trainer.strategy.root_device)
        for rank, text in enumerate(texts):
            told += [{"rank": rank, **entry} for entry in json.loads(text)]
        bad = [entry for entry in told if not torch.isfinite(torch.tensor(entry["loss"]))]
        lines = [
            f"pair {entry['pair']}: loss {entry['loss']}, rank {entry['rank']}, micro-batch {entry['micro-batch']}"
            for entry in bad or told
        ]
        if len(lines) > MOST_TOLD:
            lines[MOST_TOLD:] = [f"and {len(lines) - MOST_TOLD} more"]
        raise WrongNumbers(
            f"step {trainer.global_step + 1}: {what} is not finite; no weight was changed by it, and no checkpoint "
            f"holds it. {'These pairs' if bad else 'All losses are finite; the step had these pairs'} "
            "(rows of the training set after preparation): " + "; ".join(lines)
        )

    def clear(self) -> None:
        """Begin a new step."""
        self.rows, self.losses, self.counted = [], [], []
