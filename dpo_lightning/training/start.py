"""Before the first update policy and reference are the same model, and the run proves it on its first batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_lightning.cluster.exits import WrongNumbers
from dpo_lightning.cluster.ranks import gather_texts
from dpo_lightning.types import PairLogps

EXACT, ROUNDED = 1e-6, 5e-3  # on the loss: float32, and 16-bit arithmetic
# Nats, times the root of the tokens, whose errors add up at random: a cached log-probability was computed in another
# batch, so it may be rounded otherwise.
EXACT_CACHED, ROUNDED_CACHED = 1e-3, 0.15


def check_start(module: Any, policy: PairLogps, reference: PairLogps, loss_B: Tensor) -> None:
    """Raise WrongNumbers unless policy and reference are equal, and the loss that of equal models (ln 2 for DPO).

    Collective: every rank raises what one has seen.
    """
    # A loss may depend on more than the ratios of the two, as one with a term of supervised training does.
    equal = PairLogps(*(part.detach().nan_to_num(1.0) for part in policy))
    expected = module.loss(equal, equal).mean().item()
    loss = loss_B.detach().mean().item()
    rounded = "16" in str(module.trainer.precision)
    gaps_2B = torch.cat([policy.chosen - reference.chosen, policy.rejected - reference.rejected]).detach().abs()
    if module.reference.name == "cached":
        tokens_2B = torch.cat([policy.chosen_tokens, policy.rejected_tokens])
        holds = (gaps_2B / tokens_2B.sqrt()).max().item() <= (ROUNDED_CACHED if rounded else EXACT_CACHED)
    else:
        holds = abs(loss - expected) <= (ROUNDED if rounded else EXACT) * max(1.0, abs(expected))
    told = (
        ""
        if holds
        else (
            f"the first loss is {loss:.6f} and should be {expected:.6f}, as policy and reference are equal before the "
            f"first update; their log-probabilities differ by up to {gaps_2B.max().item():.4g}. One of these is wrong: "
            "the reference is not the base model, the adapter did not start at zero, a dropout or another noise is on, "
            "or the log-probabilities are computed differently"
        )
    )
    for rank, text in enumerate(gather_texts(told, module.trainer.strategy.root_device)):
        if text:
            raise WrongNumbers(f"rank {rank}: {text}" if module.trainer.world_size > 1 else text)
