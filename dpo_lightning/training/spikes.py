"""Steps whose loss or gradient norm leaps out of the last ones are left out, if that is wanted.

The rule is that of OLMo-core's SkipStepOptimizer: beyond so many standard deviations above the mean of a window.
The window is part of the checkpoint, so that a resumed run leaves out the same steps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW, LEAST = 128, 16  # steps that are looked at, and how many there must be


class Spikes:
    """Judges each step by the ones before it.

    Args:
        deviations: how many standard deviations above the mean a spike is; None: nothing is one.

    """

    def __init__(self, deviations: float | None):
        self.deviations = deviations
        self.skipped = 0
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float, norm: Any) -> bool:
        """Return whether a step's mean loss or gradient norm is a spike; both are part of the window from now on."""
        if self.deviations is None:
            return False
        norm = float(norm)
        spike = len(self._seen) >= LEAST and any(
            value > self._limit([step[which] for step in self._seen]) for which, value in enumerate((loss, norm))
        )
        self._seen.append((loss, norm))
        self.skipped += spike
        return spike

    def _limit(self, values: Sequence[float]) -> float:
        assert self.deviations is not None
        return statistics.fmean(values) + self.deviations * statistics.pstdev(values)

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {"seen": [list(step) for step in self._seen], "skipped": self.skipped}

    def load(self, state: dict) -> None:
        """Go on from `state`."""
        self._seen.clear()
        self._seen.extend(tuple(step) for step in state["seen"])
        self.skipped = state["skipped"]
