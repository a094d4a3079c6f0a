"""One run at a time trains in a run's folder: its first process holds RUN_DIR/.lock. Imports nothing heavy.

The system lets go of it with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from dpo_lightning.cache import LOCKLESS
from dpo_lightning.types import UserError

LOCK = ".lock"
PATIENCE = 90.0  # seconds that a job which SLURM has started again waits for its own last process
_held: dict[Path, int] = {}


class Taken(UserError):
    """The folder is another process': nothing is written there, not even of this one's end."""


def take(run_dir: Path) -> bool:
    """Hold the lock of a folder that is there, until `let_go`; return whether it was not held before.

    Raises Taken where another process holds it.
    """
    if run_dir in _held or not run_dir.is_dir():
        return False
    try:
        file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(file, run_dir)
        except BaseException:
            os.close(file)
            raise
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error}); free space or choose another") from error
    _held[run_dir] = file
    with suppress(OSError):  # a full disk: it only tells others who is here
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return True


def is_restarted() -> bool:
    """Return whether SLURM has started this job again, whose last process may be about to end."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _wait(file: int, run_dir: Path) -> None:
    deadline = time.monotonic() + (PATIENCE if is_restarted() else 0.0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in LOCKLESS:
                print(f"warning: {run_dir} cannot be locked ({error.strerror}): do not start a run in it twice")
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            who = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            raise Taken(
                f"run_dir={run_dir}: {who} trains there; wait for its end, or choose another folder; "
                f"if its machine is gone, remove {run_dir / LOCK}"
            )
        time.sleep(1)


def let_go(run_dir: Path) -> None:
    """Let other processes train there."""
    if (file := _held.pop(run_dir, None)) is not None:
        os.close(file)
