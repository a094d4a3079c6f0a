"""What ranks tell each other besides gradients: sums and texts, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor


def together() -> bool:
    """Return whether there is more than this process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def over_ranks(values: Tensor, device: torch.device) -> list[float]:
    """Return the sum of every rank's `values`, a vector; the ranks talk over `device`."""
    if together():
        values = values.to(device, copy=True)
        torch.distributed.all_reduce(values)
    return values.tolist()


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Return every rank's text, in the order of the ranks, on every rank."""
    if not together():
        return [text]
    # with an end of its own, as no tensor is made of an empty text
    own = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(own)], device=device))
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    torch.distributed.all_gather(texts, torch.cat([own, own.new_zeros(longest - len(own))]))
    parts = zip(texts, lengths, strict=True)
    return [bytes(part[: int(length) - 1].tolist()).decode() for part, length in parts]


def from_rank_0(trainer: Any, make: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0 makes; raise on every rank what it raises."""
    outcome = None
    if trainer.is_global_zero:
        try:
            outcome = make()
        except Exception as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class Words:
    """Talk between the ranks' CPUs, over gloo: of what concerns processes, without a wait for a GPU."""

    def __init__(self) -> None:
        self._group: Any = None

    def highest(self, word: int) -> int:
        """Return the largest number that a rank has said. Collective."""
        if not together():
            return word
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        said = torch.tensor([int(word)])
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(said)

    def wait(self) -> None:
        """Wait until all ranks have come here, if they have talked before."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
