"""Each loss against numbers worked out by hand, and against the properties that define DPO."""

import math

import pytest
import torch

from dpo_lightning.objective.losses import apo_down, apo_zero, dpo, hinge, ipo, robust, rpo, sigmoid_norm
from dpo_lightning.objective.metrics import preference_metrics
from dpo_lightning.types import PairLogps


def logps(chosen, rejected, tokens=(1.0, 1.0)):
    return PairLogps(*(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, *tokens)))


POLICY, REFERENCE = logps(-10.0, -14.0, (4.0, 2.0)), logps(-12.0, -13.0, (4.0, 2.0))
# logratios: chosen 2, rejected -1, so h = 3; per token 0.5 and -0.5, so h' = 1. log s(0.3) = -0.5543552, log s(-0.3)
# = -0.8543552.


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (lambda p, r: dpo(p, r, beta=0.1, label_smoothing=0.0), 0.5543552),
        (lambda p, r: dpo(p, r, beta=0.1, label_smoothing=0.1), 0.9 * 0.5543552 + 0.1 * 0.8543552),
        (lambda p, r: robust(p, r, beta=0.1, label_smoothing=0.1), (0.9 * 0.5543552 - 0.1 * 0.8543552) / 0.8),
        (lambda p, r: ipo(p, r, beta=0.1), (1 - 5) ** 2),
        (lambda p, r: hinge(p, r, beta=0.1), 0.7),
        (lambda p, r: hinge(p, r, beta=0.5), 0.0),
        (lambda p, r: sigmoid_norm(p, r, beta=0.3), 0.5543552),
        (lambda p, r: rpo(p, r, beta=0.1, sft_weight=0.2), 0.5543552 + 0.2 * 10 / 4),
        # s(0.2) = 0.5498340, s(-0.1) = 0.4750208, s(0.3) = 0.5744425
        (lambda p, r: apo_zero(p, r, beta=0.1), 1 - 0.5498340 + 0.4750208),
        (lambda p, r: apo_down(p, r, beta=0.1), 0.5498340 + 1 - 0.5744425),
    ],
)
def test_by_hand(loss, by_hand):
    assert loss(POLICY, REFERENCE).tolist() == pytest.approx([by_hand], abs=1e-6)


def test_equal_models_give_ln2_and_no_margin():
    assert dpo(POLICY, POLICY, beta=0.1, label_smoothing=0.3).item() == pytest.approx(math.log(2), abs=1e-12)
    assert robust(POLICY, POLICY, beta=0.1, label_smoothing=0.3).item() == pytest.approx(math.log(2), abs=1e-12)
    metrics = preference_metrics(POLICY, POLICY, 0.1)
    assert metrics["rewards/margins"].item() == 0
    assert metrics["rewards/accuracies"].item() == 0.5


def test_swapping_the_sides_flips_the_margin():
    def swap(p):
        return PairLogps(p.rejected, p.chosen, p.rejected_tokens, p.chosen_tokens)

    one, other = preference_metrics(POLICY, REFERENCE, 0.1), preference_metrics(swap(POLICY), swap(REFERENCE), 0.1)
    assert one["rewards/margins"].item() == pytest.approx(0.3)
    assert other["rewards/margins"].item() == pytest.approx(-0.3)
    assert (one["rewards/accuracies"].item(), other["rewards/accuracies"].item()) == (1.0, 0.0)


def test_rewards_are_beta_times_the_logratios():
    metrics = preference_metrics(POLICY, REFERENCE, 0.1)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.2)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.1)
    assert metrics["logps/chosen"].item() == -10


def test_the_gradient_pulls_chosen_up_and_rejected_down_by_the_same():
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-10.0, -14.0))
    policy = PairLogps(chosen, rejected, torch.ones(1), torch.ones(1))
    dpo(policy, REFERENCE, beta=0.1, label_smoothing=0.0).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    # beta * sigmoid(-beta h), equation 8 of the DPO paper
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.3)))
    assert rejected.grad.item() == pytest.approx(-chosen.grad.item())
