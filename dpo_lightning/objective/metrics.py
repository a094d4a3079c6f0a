"""What is logged of a batch: TRL's names, means over pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lightning.types import PairLogps


def preference_metrics(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, Tensor]:
    """Return each pair's metrics, shape (B,) each, detached.

    A reward is beta times the logratio of policy and reference, in nats. A tie counts as half an accuracy: with
    policy equal to reference the accuracy is 0.5, where TRL, which counts a tie as wrong, has 0.
    """
    chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
    chosen_rewards_B = beta * (chosen - reference.chosen)
    rejected_rewards_B = beta * (rejected - reference.rejected)
    margins_B = chosen_rewards_B - rejected_rewards_B
    return {
        "rewards/chosen": chosen_rewards_B,
        "rewards/rejected": rejected_rewards_B,
        "rewards/accuracies": (1 + torch.sign(margins_B)) / 2,
        "rewards/margins": margins_B,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
