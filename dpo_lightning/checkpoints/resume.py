"""Which checkpoint a run goes on from, and whether it may. Imports nothing heavy: it answers before anything else."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from dpo_lightning.checkpoints.folder import (
    MANIFEST,
    RUN_ID,
    STATE,
    links,
    published,
    run_id,
    set_aside,
    step_number,
    step_of,
    verify,
)
from dpo_lightning.checkpoints.starts import is_repeated
from dpo_lightning.paths import looking
from dpo_lightning.types import UserError

ORIGIN = "resumed_from"  # of a run's folder


def to_resume(resume: str, run_dir: Path, tidy: bool = True, line: str = "") -> Path | None:
    """Return the state file that `resume` names, or None to start anew; never overwrite a run.

    Args:
        resume: auto, never, or a checkpoint's folder. Where the run was begun from that one, or has gone back to it
            and is started again by the same line, it goes on from its own newest; then the named one may be gone.
        run_dir: the run's folder.
        tidy: move broken checkpoints aside.
        line: what this start was asked, as `is_repeated` compares it.

    Raises UserError for a path that is not a whole checkpoint, for a folder that holds a run which cannot be gone on
    with, and for one whose checkpoints are all broken.
    """
    try:
        if resume in ("auto", "never"):
            return _by_itself(resume, run_dir, tidy)
        return _by_name(resume, run_dir, tidy, line)
    except PermissionError as error:
        raise UserError(
            f"run_dir={run_dir}: {error.filename} may not be read; give this account the right to, or choose another"
        ) from error


def _by_name(resume: str, run_dir: Path, tidy: bool, line: str) -> Path:
    folder = _named(resume, run_dir)
    own = folder.parent.parent == run_dir
    begun = not own and _origin(run_dir) == str(folder)
    if begun or (own and is_repeated(run_dir, line)):  # a requeued job's
        found = newest(run_dir, tidy)
        _refuse_links(run_dir, found)
        if found is not None and step_of(found) >= (step_number(folder) or 0):
            return found
    with looking("resume", folder):
        if not folder.exists():
            raise UserError(f"resume={resume}: no such checkpoint; give an existing one, auto or never")
    if (reason := verify(folder)) is not None:
        raise UserError(
            f"resume={resume}: not a whole checkpoint, {reason}; give a folder like RUN_DIR/checkpoints/step-00000012"
        )
    if not own and not begun and (newest(run_dir, tidy) is not None or _has_trained(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: holds a run that was not begun from resume={folder}; choose another folder"
        )
    return folder / STATE


def _by_itself(resume: str, run_dir: Path, tidy: bool) -> Path | None:
    found, trained = newest(run_dir, tidy), _has_trained(run_dir)
    if resume == "never":
        if found is not None or trained:
            raise UserError(
                f"run_dir={run_dir}: holds a run, which resume=never would start over; "
                "choose another folder or remove it"
            )
        return None
    _refuse_links(run_dir, found)
    if found is None and _has_broken(run_dir):
        anew = "another run_dir" if trained else "resume=never"
        raise UserError(
            f"run_dir={run_dir}: none of its checkpoints is whole, see {run_dir / 'checkpoints'}; "
            f"give resume=PATH of a good copy, or {anew} to start anew"
        )
    if found is None and trained and _was_killed(run_dir):
        if is_first_process():
            print(f"{run_dir}: the run there was ended before its first checkpoint; it starts anew")
        return None
    if found is None and trained:
        raise UserError(
            f"run_dir={run_dir}: holds a run, and no checkpoint to go on from; choose another folder or remove it"
        )
    return found


def _named(resume: str, run_dir: Path) -> Path:
    """Return the folder that a path leads to: one of the run's own as such, though the run lie behind a symlink."""
    folder, own = Path(resume).resolve(), run_dir / "checkpoints"
    return own / folder.name if folder.parent == own.resolve() else folder


def _origin(run_dir: Path) -> str | None:
    """Return the checkpoint of another run that this one was begun from."""
    origin = run_dir / ORIGIN
    return origin.read_text() if origin.exists() else None


def _refuse_links(run_dir: Path, found: Path | None) -> None:
    """Raise UserError for a symlink that is newer than what was found: its steps would be lost without a word."""
    for link in links(run_dir / "checkpoints")[:1]:
        if found is None or (step_number(link) or 0) > step_of(found):
            raise UserError(
                f"run_dir={run_dir}: checkpoints/{link.name} is a symbolic link and is not followed; "
                "move the folder back, or give resume=PATH of another checkpoint"
            )


def newest(run_dir: Path, tidy: bool = True) -> Path | None:
    """Return the state file of the newest checkpoint that verifies, or None where there is none.

    The first process says of every newer one why it is skipped, and moves it aside: it stays for a person to look at,
    and is in the way of no other.
    """
    for folder in published(run_dir / "checkpoints"):
        if (reason := verify(folder)) is None:
            return folder / STATE
        if is_first_process():
            try:
                then = f"moved to {set_aside(folder).name}" if tidy else "it will be moved aside"
            except OSError as error:
                then = f"it cannot be moved aside: {error.strerror}"
            print(f"skipping {folder}: {reason}; {then}")
    return None


def is_first_process() -> bool:
    """Return whether this process is the first of the run's, as far as its launcher's variables tell."""
    if rank := os.environ.get("RANK"):
        return int(rank) == 0
    # Lightning's own children inherit SLURM_PROCID=0 from an interactive job: every one that is set has to be 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def id_of(run_dir: Path, resume: Path | None) -> str:
    """Return the run's id: what its folder says, what the checkpoint in it says that it goes on from, or a new one."""
    if (known := run_id(run_dir)) is not None:
        return known
    inside = resume is not None and resume.parent.parent.parent == run_dir
    known = json.loads((resume.parent / MANIFEST).read_bytes()).get("run") if inside and resume is not None else None
    made = known or secrets.token_hex(4)
    with (run_dir / RUN_ID).open("w") as stream:  # an empty one would disown every checkpoint
        stream.write(made)
        stream.flush()
        os.fsync(stream.fileno())
    return made


def undo_later(run_dir: Path, step: int) -> None:
    """Set aside this run's checkpoints of later steps than the one it goes back to: it will make them anew."""
    for folder in (*published(run_dir / "checkpoints"), *links(run_dir / "checkpoints")):
        if (number := step_number(folder)) is not None and number > step:
            print(f"{folder.name} is not part of this run any more: moved to {set_aside(folder, 'undone').name}")


def _has_trained(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"train/loss"' in metrics.read_text(errors="replace")


def _was_killed(run_dir: Path) -> bool:
    """Return whether the run in a folder has left nothing that starting anew would replace."""
    return (run_dir / RUN_ID).exists() and not any((run_dir / name).exists() for name in ("adapter", "model"))


def _has_broken(run_dir: Path) -> bool:
    checkpoints = run_dir / "checkpoints"
    return any(checkpoints.glob("broken-step-*")) or bool(published(checkpoints))  # the latter could not be moved
