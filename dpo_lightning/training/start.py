"""Before the first update policy and reference are the same model, and the run proves it on its first batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.model.logps import pair_logps, plain_logps
from dpo_lightning.types import Batch, PairLogps

EXACT, ROUNDED = 1e-6, 5e-3  # on the loss: float32, and 16-bit arithmetic


class StartError(RuntimeError):
    """The first batch shows that the run would optimise the wrong thing."""


def check_start(module: Any, batch: Batch, policy: PairLogps, reference: PairLogps, loss_B: Tensor) -> None:
    """Raise StartError unless the loss is that of equal models (ln 2 for DPO) and the head computes what it should."""
    equal = PairLogps(*(torch.ones_like(part) for part in policy))
    expected = module.loss(equal, equal).mean().item()
    loss = loss_B.detach().mean().item()
    rounded = "16" in str(module.trainer.precision)
    if not abs(loss - expected) <= (ROUNDED if rounded else EXACT) * max(1.0, expected):
        gap_B = (policy.chosen - reference.chosen).detach().abs()
        raise StartError(
            f"the first loss is {loss:.6f} and should be {expected:.6f}, as policy and reference are equal before the "
            f"first update; their log-probabilities differ by up to {gap_B.max().item():.4g}. One of these is wrong: "
            "the reference is not the base model, the adapter did not start at zero, a dropout is on, or the "
            "log-probabilities are computed differently"
        )
    _check_head(module, batch, rounded)


def _check_head(module: Any, batch: Batch, rounded: bool) -> None:
    """Compare the first pair with the model's own logits: an unknown operation behind the head would show."""
    p, c, r = batch.lengths_B3[0].tolist()
    first = replace(batch, ids_T=batch.ids_T[: p + c + r], lengths_B3=batch.lengths_B3[:1], rows_B=batch.rows_B[:1])
    with torch.no_grad():
        ours, plain = pair_logps(module.policy, first), plain_logps(module.policy, first)
    for side, tokens in (("chosen", c), ("rejected", r)):
        gap = abs(getattr(ours, side) - getattr(plain, side)).item() / tokens
        if not gap <= (0.05 if rounded else 1e-3):
            raise StartError(
                f"this model's own logits give another log-probability for the first {side} completion (by {gap:.4g} "
                "a token): its head does something that is not supported. Please report the model's name"
            )
