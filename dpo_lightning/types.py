"""The nouns that pass between the rooms, and two errors: the user's to mend, and what a run cannot go on after.

Legend of the shape suffixes used in all files:
    B  pairs of a batch        T  token positions        S  scored positions (completion tokens)
    H  hidden size             V  vocabulary             2B chosen rows first, then rejected rows
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class UserError(ValueError):
    """A mistake in what the user gave. The text names the key or the row, and the remedy; exit code 2."""


class RunError(RuntimeError):
    """What a run cannot go on after. The text says what is wrong and what to do; `exit_code` is in docs/cluster.md."""

    exit_code = 1


class Message(TypedDict):
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    content: str


class Pair(NamedTuple):
    """A prompt with a preferred and a rejected completion: all three text, or all three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


@dataclass  # not frozen: Lightning sets its fields when it converts tensors
class Batch:
    """B tokenised pairs without any padding: how they are laid out for the model is the model's affair.

    ids_T:      prompt | chosen | rejected of pair 0, then of pair 1, ...; int64
    lengths_B3: number of tokens of prompt, chosen and rejected of each pair; int64, all on the CPU
    rows_B:     index of each pair in its data set; int64, on the CPU
    step_pairs: number of pairs that the optimizer step this batch belongs to averages over
    counted:    whether its pairs go into the step's mean; not those of a forward pass that only keeps ranks in step
    opening:    number of leading tokens that all prompts have in common, less than the shortest prompt
    reference_B2: chosen and rejected log-probabilities under the reference where they were computed before; float32,
                  an array, since Lightning's half precision rounds every tensor of a batch
    """

    ids_T: Tensor
    lengths_B3: Tensor
    rows_B: Tensor
    step_pairs: int
    counted: bool = True
    opening: int = 0
    reference_B2: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.rows_B)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Move the tokens; the lengths stay on the CPU, where the layout is planned without a device sync."""
        return replace(self, ids_T=self.ids_T.to(device, non_blocking=non_blocking))


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs, summed over the completion's tokens, and the number of those tokens.

    All four are float32 of shape (B,); log-probabilities are in nats.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
