"""The starts of a run, a line each in RUN_DIR/starts.jsonl: when, from which step, with which settings changed.

A run that is started again and again without coming to a new checkpoint is stopped. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_lightning.cluster.exits import NoProgress

STARTS = "starts.jsonl"


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


def check_progress(run_dir: Path, step: int, most: int | None) -> None:
    """Raise NoProgress where the last `most` + 1 starts all began at `step` and none came to an orderly end.

    `most` is how often a run may be started again without a new checkpoint; None for any number.
    """
    rows = read(run_dir)
    since = max((at for at, row in enumerate(rows) if "end" in row), default=-1) + 1
    starts = [at for at, row in enumerate(rows) if at >= since and "start" in row]
    others = [at for at in starts if rows[at]["start"] != step]
    same = [at for at in starts if at > max(others, default=-1)]
    if most is None or len(same) <= most:
        return
    raise NoProgress(
        f"{run_dir}: started {len(same)} times from step {step} and never came to a new checkpoint"
        f"{_told(rows[same[0] :])}; mend the cause, then start it with cluster.max_restarts=null, or more of them"
    )


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the failures said, each text once, the last first."""
    failures = {row["failed"]: row for row in rows if "failed" in row}
    texts = [f"{text}, on rank {row.get('rank')} at {_where(row)}" for text, row in reversed(failures.items())]
    return "; it ended with " + ", and with ".join(texts[:2]) if texts else ""


def _where(row: Mapping[str, Any]) -> str:
    pairs = ", ".join(map(str, row.get("pairs") or ()))
    return f"step {row.get('step')}" + (f", training pairs {pairs}" if pairs else "")
