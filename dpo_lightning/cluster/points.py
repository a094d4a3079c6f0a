"""The named points of a run: where a process is, for the watchdog, and where tests let it fail.

DPO_LIGHTNING_FAULT="at=save.before_rename;do=SIGKILL;rank=1;step=7", and DPO_LIGHTNING_ALLOW_FAULTS=1 beside it.
Besides: nth=2, the second time that this rank comes by at this step; once=FILE, never again when FILE is there.
Without the variable every point is a note of where the process is, and nothing else.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

POINTS = {
    "launch", "setup", "data.next", "step.begin", "forward", "forward.end", "loss", "gradient", "backward.begin",
    "backward.end", "update.begin", "update.end", "step.end", "log", "val.mid", "reference.batch", "load.mid",
    "save.gather", "save.begin", "save.after_file", "save.before_manifest", "save.before_rename", "save.after_rename",
    "retain.before_delete",
}  # fmt: skip
KEYS = {"at", "do", "rank", "step", "nth", "once"}
ACTIONS = ("raise", "oom", "enospc", "eio", "sleep", "exit", "nan", "inf", "times")
SPOILING = {"loss", "gradient"}  # points where a number is made nan or inf
FAULT, ALLOW = "DPO_LIGHTNING_FAULT", "DPO_LIGHTNING_ALLOW_FAULTS"
_met: Counter[tuple[str, int | None]] = Counter()


class Place(NamedTuple):
    """Where the main thread is: a point it has passed, the step, the how many-th of it, and time.monotonic() then."""

    point: str
    step: int
    number: int
    since: float


_place = Place("start", 0, 0, time.monotonic())


def here() -> Place:
    """Return the point that the main thread has passed last."""
    return _place


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
    if unknown := {*fault} - KEYS:
        raise ValueError(f"{FAULT}: unknown {', '.join(sorted(unknown))}")
    if fault["at"] not in POINTS:
        raise ValueError(f"{FAULT}: no point {fault['at']}; there are {', '.join(sorted(POINTS))}")
    action = fault["do"].partition(":")[0]
    if action not in ACTIONS and action not in signal.Signals.__members__:
        raise ValueError(f"{FAULT}: no action {action}; there are {', '.join(ACTIONS)} and names of signals")
    if (action in ("nan", "inf", "times")) != (fault["at"] in SPOILING):
        raise ValueError(f"{FAULT}: nan, inf and times:FACTOR go with {' and '.join(sorted(SPOILING))}, none else does")
    return fault


def _due(point: str, step: int | None) -> Mapping[str, str] | None:
    """Return the fault of this point, where one is asked for at this rank and step."""
    assert point in POINTS, point
    fault = _fault(os.environ.get(FAULT), os.environ.get(ALLOW))
    if fault is None or fault["at"] != point:
        return None
    if "rank" in fault and int(fault["rank"]) != rank_of_process():
        return None
    if "step" in fault and step is not None and int(fault["step"]) != step:
        return None
    _met[point, step] += 1
    if "nth" in fault and _met[point, step] != int(fault["nth"]):
        return None
    if "once" in fault:
        if Path(fault["once"]).exists():
            return None
        Path(fault["once"]).touch()
    return fault


def at(point: str, step: int | None = None) -> None:
    """Note that the main thread has come here, and let the fault of this point happen."""
    global _place  # noqa: PLW0603 - there is one main thread
    if threading.current_thread() is threading.main_thread():
        step = _place.step if step is None else step
        _place = Place(point, step, _place.number + 1 if step == _place.step else 0, time.monotonic())
    if (fault := _due(point, step)) is None:
        return
    action, _, argument = fault["do"].partition(":")
    if action == "raise":
        raise RuntimeError(f"the fault that was asked for at {point}")
    if action == "oom":
        import torch

        raise torch.OutOfMemoryError(f"out of memory, as was asked for at {point}")
    if action in ("enospc", "eio"):
        number = errno.ENOSPC if action == "enospc" else errno.EIO
        raise OSError(number, f"{os.strerror(number)}, as was asked for")
    if action == "sleep":
        time.sleep(float(argument))
    elif action == "exit":
        os._exit(int(argument))
    else:
        os.kill(os.getpid(), signal.Signals[action])


def spoilt(loss_B: Any, step: int) -> Any:
    """Return the losses, shape (B,), spoilt where that is asked for; or their gradients, on the way back."""
    if (fault := _due("loss", step)) is not None:
        loss_B = loss_B * float(fault["do"].removeprefix("times:"))
    if loss_B.requires_grad and (fault := _due("gradient", step)) is not None:
        factor = float(fault["do"].removeprefix("times:"))
        loss_B.register_hook(lambda gradient: gradient * factor)
    return loss_B
