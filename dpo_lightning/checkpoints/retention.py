"""Which checkpoints stay. Only those that verify count, and none is deleted before the newest has been verified."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from dpo_lightning.checkpoints.folder import published, step_number, verify
from dpo_lightning.checkpoints.writer import REAL, At, Disk, aside, nowhere, remove

PIN = "pinned"  # touch RUN_DIR/checkpoints/step-00000012/pinned, and it is never deleted


class Verified:
    """Whether a checkpoint verifies: hashed once, and again only where a file's size, time or place is another.

    What changes on the disk and leaves no trace in these is found by the run that would resume from it.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[object, bool]] = {}

    def __call__(self, folder: Path) -> bool:
        """Return whether it does."""
        stamp = _stamp(folder)  # before the files are read: a change while they are is found the next time
        if folder not in self._seen or self._seen[folder][0] != stamp:
            self._seen[folder] = stamp, verify(folder) is None
        return self._seen[folder][1]


def _stamp(folder: Path) -> object:
    facts = [(path.name, path.lstat()) for path in sorted(folder.iterdir()) if path.name != PIN]
    return [(name, fact.st_size, fact.st_mtime_ns, fact.st_ino) for name, fact in facts]


def retain(
    checkpoints: Path,
    keep_last: int | None,
    best_step: int | None,
    disk: Disk = REAL,
    at: At = nowhere,
    is_whole: Callable[[Path], bool] = lambda folder: verify(folder) is None,
) -> list[Path]:
    """Delete what is older than the newest `keep_last` checkpoints that verify; return the folders deleted.

    Args:
        checkpoints: the folder that holds them.
        keep_last: how many; None deletes nothing.
        best_step: the step of one that stays, too; besides, those stay that hold a file named `pinned`.
        disk: what is done is done through it.
        at: called at retain.before_delete, for each.
        is_whole: says which verify; a Verified() that is kept from save to save hashes each of them once.

    Nothing is deleted where the newest one does not verify, or fewer than `keep_last` do. Symlinks are left alone.
    Raises OSError where a folder cannot be deleted.

    """
    folders = published(checkpoints)
    if keep_last is None or not folders or not is_whole(folders[0]):
        return []
    assert keep_last >= 1
    kept = list(islice(filter(is_whole, folders), keep_last))
    if len(kept) < keep_last:
        return []
    older = folders[folders.index(kept[-1]) + 1 :]
    gone = [folder for folder in older if step_number(folder) != best_step and not os.path.lexists(folder / PIN)]
    for folder in gone:
        at("retain.before_delete")
        hidden = aside(folder, "-deleted")
        remove(hidden, disk)
        disk.rename(folder, hidden)
        disk.fsync_dir(checkpoints)  # or a crash could leave the name with half of the files
        remove(hidden, disk)
    return gone


def best_step(run_dir: Path) -> int | None:
    """Return the step of the checkpoint with the lowest val/loss in metrics.jsonl; None where none was validated."""
    metrics = run_dir / "metrics.jsonl"
    losses: dict[int, float] = {}
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last row of a killed process
            continue
        if isinstance(row, dict) and "step" in row and isinstance(row.get("val/loss"), float | int):
            losses[row["step"]] = row["val/loss"]
    steps = [step for folder in published(run_dir / "checkpoints") if (step := step_number(folder)) is not None]
    validated = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
    return min(validated, key=losses.__getitem__, default=None)
