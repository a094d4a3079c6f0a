"""The starts of a run, a line each in RUN_DIR/starts.jsonl: when, from which step, with which settings changed.

A run that is started again and again without coming to a new checkpoint is stopped. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_lightning.cluster.exits import NoProgress

STARTS = "starts.jsonl"
GOES_ON = 128 + signal.SIGUSR1  # the exit code of a run that stopped before its end to be started again


def note(run_dir: Path, **facts: Any) -> None:
    """Append what has happened: a start ("start": step), a failure ("failed": text) or an orderly end ("end": code)."""
    row = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "host": socket.gethostname(), **facts}
    job = {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if name in os.environ}
    if not run_dir.is_dir():  # it ended before it had begun
        return
    try:
        with (run_dir / STARTS).open("a") as stream:
            stream.write(json.dumps(row | job) + "\n")
    except OSError as error:  # a full disk: what ended the run is the thing to tell
        print(f"warning: {run_dir / STARTS} cannot be written: {error}", flush=True)


def announce(run_dir: Path, step: int, line: str) -> None:
    """Note that a process begins to load, for one that never comes to its start; a job's folder is made for it."""
    if "SLURM_JOB_ID" in os.environ:
        with suppress(OSError):  # told, with the remedy, when the run is opened
            run_dir.mkdir(parents=True, exist_ok=True)
    note(run_dir, begun=step, line=line)


def is_repeated(run_dir: Path, line: str) -> bool:
    """Return whether the last start that has come to its training was by the same line."""
    rows = read(run_dir)
    opened = max((at for at, row in enumerate(rows) if "start" in row), default=0)
    begun = [row for row in rows[:opened] if "begun" in row][-1:]
    return bool(begun) and begun[0].get("line") == line


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows; a line that a crash cut short is left out."""
    file = run_dir / STARTS
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def check_progress(run_dir: Path, step: int, most: int | None, first: bool = True) -> None:
    """Raise NoProgress where the last `most` + 1 starts all began at `step` and none of them gained anything.

    `most` is how often a run may be started again without a new checkpoint; None for any number. `first`: this is the
    first process of the run, which announces it after this.
    """
    rows = read(run_dir)
    if not first and rows and "begun" in rows[-1]:
        rows.pop()  # it may be of this start
    since = max((at for at, row in enumerate(rows) if "end" in row and _has_gained(row)), default=-1) + 1
    starts = _starts(rows[since:])
    others = [n for n, (_, start) in enumerate(starts) if start != step]
    same = starts[max(others, default=-1) + 1 :]
    if most is None or len(same) <= most:
        return
    raise NoProgress(
        f"{run_dir}: started {len(same)} times from step {step} and never came to a new checkpoint"
        f"{_told(rows[since + same[0][0] :])}; "
        "mend the cause, then start it with cluster.max_restarts=null, or more of them"
    )


def _has_gained(end: Mapping[str, Any]) -> bool:
    """Return whether the count of starts that gained nothing begins anew after this orderly end.

    After one that is to be started again it does so only where pairs were added to the reference's cache: the job's
    time may have been over before the first step. Of steps nothing is asked: after some the next start is from another.
    """
    return end["end"] != GOES_ON or bool(end.get("pairs_cached"))


def _starts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return where each start stands, and the step that it was from; of its two rows the first."""
    found: list[tuple[int, int]] = []
    announced = False
    for at, row in enumerate(rows):
        if "begun" in row or ("start" in row and not announced):
            found.append((at, row["begun"] if "begun" in row else row["start"]))
        announced = "begun" in row
    return found


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the failures said, each text once, the last first."""
    failures = {row["failed"]: row for row in rows if "failed" in row}
    if not failures and any(row.get("end") == GOES_ON for row in rows):
        return "; the job's time was over, or it was preempted, before it had made a step: give it more"
    texts = [f"{text}, on rank {row.get('rank')} at {_where(row)}" for text, row in reversed(failures.items())]
    return "; it ended with " + ", and with ".join(texts[:2]) if texts else ""


def _where(row: Mapping[str, Any]) -> str:
    pairs = ", ".join(map(str, row.get("pairs") or ()))
    return f"step {row.get('step')}" + (f", training pairs {pairs}" if pairs else "")
