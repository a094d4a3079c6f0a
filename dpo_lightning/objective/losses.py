"""The losses: one function each, PairLogps of policy and reference -> loss of each pair, shape (B,).

Notation of the docstrings: h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), the
difference of the two logratios; h' the same of log-probabilities per completion token; s the sigmoid; b beta; e
label_smoothing. Names and values as in TRL, but for `dpo` with e > 0, which is the conservative DPO that TRL has
dropped, and for `rpo`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.types import PairLogps


def _h(policy: PairLogps, reference: PairLogps) -> Tensor:
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def _h_per_token(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen_B = (policy.chosen - reference.chosen) / policy.chosen_tokens
    return chosen_B - (policy.rejected - reference.rejected) / policy.rejected_tokens


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(b h) - e log s(-b h).

    Equation 7 of https://arxiv.org/abs/2305.18290; e, the assumed share of flipped labels, is equation 3 of
    https://ericmitchell.ai/cdpo.pdf.
    """
    logits_B = beta * _h(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(logits_B) - label_smoothing * F.logsigmoid(-logits_B)


def robust(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - e) log s(b h) + e log s(-b h)] / (1 - 2 e).

    Unbiased under labels flipped with probability e < 0.5; equation 11 of https://arxiv.org/abs/2403.00409.
    """
    logits_B = beta * _h(policy, reference)
    kept, flipped = -F.logsigmoid(logits_B), -F.logsigmoid(-logits_B)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """(h' - 1 / (2 b))^2.

    Equation 17 of https://arxiv.org/abs/2310.12036; the mean over tokens was confirmed by its authors to TRL.
    """
    return (_h_per_token(policy, reference) - 1 / (2 * beta)) ** 2


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - b h): the normalised variant of SLiC, section 2 of https://arxiv.org/abs/2309.06657."""
    return F.relu(1 - beta * _h(policy, reference))


def sigmoid_norm(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """-log s(b h'), with a beta of 2 to 10: the length-normalised DPO of section 5 of https://arxiv.org/abs/2411.15124."""
    return -F.logsigmoid(beta * _h_per_token(policy, reference))


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float, sft_weight: float) -> Tensor:
    """-log s(b h) - w log pi(chosen) / tokens, w being sft_weight: keeps the chosen answers likely.

    Equation 1 of https://arxiv.org/abs/2404.19733 divided by its alpha: w is 1 / alpha. TRL's `sft` is a mean over all
    tokens of a micro-batch, so that longer answers weigh more.
    """
    return -F.logsigmoid(beta * _h(policy, reference)) - sft_weight * policy.chosen / policy.chosen_tokens


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """1 - s(b (log pi(chosen) - log ref(chosen))) + s(b (log pi(rejected) - log ref(rejected))).

    For chosen answers better than the model's own; equation 7 of https://arxiv.org/abs/2408.06266.
    """
    chosen_B, rejected_B = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return 1 - F.sigmoid(beta * chosen_B) + F.sigmoid(beta * rejected_B)


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """s(b (log pi(chosen) - log ref(chosen))) + 1 - s(b h).

    For chosen answers worse than the model's own; equation 8 of https://arxiv.org/abs/2408.06266.
    """
    return F.sigmoid(beta * (policy.chosen - reference.chosen)) + 1 - F.sigmoid(beta * _h(policy, reference))
