"""Faults on purpose, for tests: what happens when a process dies, or the disk is full, at a named point.

DPO_LIGHTNING_FAULT="at=save.before_rename;do=SIGKILL;rank=1;step=7", and DPO_LIGHTNING_ALLOW_FAULTS=1 beside it.
Without the variable every point is a call that returns.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
from collections.abc import Mapping

POINTS = {
    "step.begin", "step.end", "val.mid", "load.mid", "save.begin", "save.after_file", "save.before_manifest",
    "save.before_rename", "save.after_rename", "retain.before_delete",
}  # fmt: skip
FAULT, ALLOW = "DPO_LIGHTNING_FAULT", "DPO_LIGHTNING_ALLOW_FAULTS"


def rank_of_process() -> int:
    """Return this process' rank as its environment tells it, before any process group is made."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


@functools.cache
def _fault(text: str | None, allowed: str | None) -> Mapping[str, str] | None:
    """Return the fault that is asked for. Raises ValueError for one that cannot happen: a typo would pass a test."""
    if not text:
        return None
    if allowed != "1":
        raise ValueError(f"{FAULT} is set and {ALLOW}=1 is not: faults are for tests")
    fault = dict(part.split("=", 1) for part in text.split(";"))
    if unknown := {*fault} - {"at", "do", "rank", "step"}:
        raise ValueError(f"{FAULT}: unknown {', '.join(sorted(unknown))}")
    if fault["at"] not in POINTS:
        raise ValueError(f"{FAULT}: no point {fault['at']}; there are {', '.join(sorted(POINTS))}")
    action = fault["do"].partition(":")[0]
    if action not in ("raise", "enospc", "sleep") and action not in signal.Signals.__members__:
        raise ValueError(f"{FAULT}: no action {action}; there are raise, enospc, sleep:SECONDS and names of signals")
    return fault


def at(point: str, step: int | None = None) -> None:
    """Let the fault of this point happen, where one is asked for at this rank and step."""
    assert point in POINTS, point
    fault = _fault(os.environ.get(FAULT), os.environ.get(ALLOW))
    if fault is None or fault["at"] != point:
        return
    if "rank" in fault and int(fault["rank"]) != rank_of_process():
        return
    if "step" in fault and step is not None and int(fault["step"]) != step:
        return
    action, _, argument = fault["do"].partition(":")
    if action == "raise":
        raise RuntimeError(f"the fault that was asked for at {point}")
    if action == "enospc":
        raise OSError(errno.ENOSPC, "no space left on device, as was asked for")
    if action == "sleep":
        time.sleep(float(argument))
        return
    os.kill(os.getpid(), signal.Signals[action])
