"""The losses: one function each, PairLogps of policy and reference -> loss of each pair, shape (B,).

Notation of the docstrings: h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), the
difference of the two logratios; s the sigmoid; b beta; e label_smoothing. Names and values as in TRL, but for
`dpo` with e > 0, which is the conservative DPO that TRL has dropped.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.types import PairLogps


def _h(policy: PairLogps, reference: PairLogps) -> Tensor:
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


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
    """(h' - 1 / (2 b))^2, with h' from log-probabilities per completion token.

    Equation 17 of https://arxiv.org/abs/2310.12036; the mean over tokens was confirmed by its authors to TRL.
    """
    chosen_B = (policy.chosen - reference.chosen) / policy.chosen_tokens
    rejected_B = (policy.rejected - reference.rejected) / policy.rejected_tokens
    return (chosen_B - rejected_B - 1 / (2 * beta)) ** 2


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - b h): the normalised variant of SLiC, section 2 of https://arxiv.org/abs/2309.06657."""
    return F.relu(1 - beta * _h(policy, reference))
