"""Which checkpoint a run goes on from, and whether it may. Imports nothing heavy: it answers before anything is loaded.

`training/writer.py` publishes the checkpoints: folders RUN_DIR/checkpoints/step-00000012 whose manifest.json is
{"step": 12, "run": ID, ..., "files": {name: {"bytes": n, "sha256": hex}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_lightning.types import UserError

STATE, CONFIG, MANIFEST = "state.ckpt", "config.json", "manifest.json"
RUN_ID, ORIGIN = "run_id", "resumed_from"  # of a run's folder
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a file in a checkpoint's folder, never a path out of it


def to_resume(resume: str, run_dir: Path, tidy: bool = True) -> Path | None:
    """Return the state file that `resume` names, or None to start anew; never overwrite a run.

    `tidy`: move broken checkpoints aside.

    Raises UserError for a path that is not a whole checkpoint, for a folder that holds a run which cannot be gone on
    with, and for one whose checkpoints are all broken.
    """
    if resume not in ("auto", "never"):
        folder = Path(resume).resolve()
        if (reason := verify(folder)) is not None:
            raise UserError(
                f"resume={resume}: not a whole checkpoint, {reason}; "
                "give a folder like RUN_DIR/checkpoints/step-00000012"
            )
        return _begun_from(folder, run_dir, tidy) or folder / STATE
    found, trained = newest(run_dir, tidy), _has_trained(run_dir)
    if resume == "never":
        if found is not None or trained:
            raise UserError(
                f"run_dir={run_dir}: holds a run, which resume=never would start over; "
                "choose another folder or remove it"
            )
        return None
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


def _begun_from(folder: Path, run_dir: Path, tidy: bool) -> Path | None:
    """Return how far the run in `run_dir` has come that was begun from another run's checkpoint: a requeued job's."""
    if folder.parent.parent == run_dir:
        return None
    found = newest(run_dir, tidy)
    if found is None and not _has_trained(run_dir):
        return None
    origin = run_dir / ORIGIN
    if not origin.exists() or origin.read_text() != str(folder):
        raise UserError(
            f"run_dir={run_dir}: holds a run that was not begun from resume={folder}; choose another folder"
        )
    return found


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


def published(checkpoints: Path) -> list[Path]:
    """Return the folders named step-NUMBER, the newest first. A symlink is none: it may lead to another run's."""
    if not checkpoints.is_dir():
        return []
    numbers = {path: step_number(path) for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink()}
    found = [(number, path) for path, number in numbers.items() if number is not None]
    return [path for _, path in sorted(found, reverse=True)]


def step_number(folder: Path) -> int | None:
    """Return the step that a checkpoint's folder is named after, or None where it has another kind of name."""
    found = re.fullmatch(r"step-([0-9]+)", folder.name)
    return int(found[1]) if found else None


def step_of(state: Path) -> int:
    """Return the step that a checkpoint's state file was saved at."""
    step = step_number(state.parent)
    assert step is not None, f"{state} is not in a checkpoint"
    return step


def set_aside(folder: Path, why: str = "broken") -> Path:
    """Rename a checkpoint to broken-step-NUMBER, or another word, with -2, ... where taken; return where it is now.

    Raises OSError where it cannot be renamed.
    """
    place, taken = folder.with_name(f"{why}-{folder.name}"), 1
    while os.path.lexists(place):
        taken += 1
        place = folder.with_name(f"{why}-{folder.name}-{taken}")
    os.rename(folder, place)
    return place


def is_first_process() -> bool:
    """Return whether this process is the first of the run's, as far as its launcher's variables tell."""
    if (rank := os.environ.get("RANK")) is not None:
        return int(rank) == 0
    # Lightning's own children inherit SLURM_PROCID=0 from an interactive job: every one that is set has to be 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def verify(folder: Path) -> str | None:
    """Return None where the manifest is this folder's and every file has its size and sha256, else what is wrong."""
    file = folder / MANIFEST
    if (reason := _absence(file)) is not None:
        return reason
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not JSON"
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not {STATE, CONFIG} <= {*files}:
        return f"{MANIFEST} names no {STATE} or no {CONFIG}"
    if (reason := _wrong_entry(files) or _of_another(folder, manifest)) is not None:
        return reason
    reasons = (_wrong_file(folder / name, **facts) for name, facts in files.items())
    return next((reason for reason in reasons if reason is not None), None)


def _wrong_entry(files: Mapping[str, Any]) -> str | None:
    for name, facts in files.items():
        if not PLAIN_NAME.fullmatch(name):
            return f"{MANIFEST} names {name!r}, which is no plain file name"
        kinds = {key: type(value) for key, value in facts.items()} if isinstance(facts, dict) else {}
        if kinds != {"bytes": int, "sha256": str}:
            return f"{MANIFEST} does not hold bytes and sha256 of {name}"
    return None


def _of_another(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Tell of a manifest that is whole and lies in the wrong place."""
    if (step := step_number(folder)) is None:
        return f"{folder.name} is not named step-NUMBER"
    if manifest.get("step") != step:
        return f"{MANIFEST} is of step {manifest.get('step')!r}, not of {step}"
    own = run_id(folder.parent.parent)
    if own is not None and manifest.get("run") != own:
        return f"{MANIFEST} is of run {manifest.get('run')!r}, not of this folder's {own!r}"
    return None


def _wrong_file(file: Path, bytes: int, sha256: str) -> str | None:
    if (reason := _absence(file)) is not None:
        return reason
    try:
        size = file.stat().st_size
        if size != bytes:
            return f"{file.name} is {'truncated' if size < bytes else 'too long'}: {size} of {bytes} bytes"
        if digest(file) != sha256:
            return f"{file.name}: its content differs from its sha256"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    return None


def _absence(file: Path) -> str | None:
    """Tell of what is not there, and of what opening would wait on or fail at: a pipe, a folder."""
    if not os.path.lexists(file):
        return f"{file.name} is missing"
    return None if file.is_file() else f"{file.name} is not a file"


def digest(file: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def run_id(run_dir: Path) -> str | None:
    """Return what the run is called in its checkpoints' manifests, or None where the folder does not say."""
    try:
        return (run_dir / RUN_ID).read_text().strip() or None
    except (OSError, ValueError):
        return None


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
    for folder in published(run_dir / "checkpoints"):
        if (number := step_number(folder)) is not None and number > step:
            print(f"{folder.name} is not part of this run any more: moved to {set_aside(folder, 'undone').name}")


def _has_trained(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"train/loss"' in metrics.read_text()


def _was_killed(run_dir: Path) -> bool:
    """Return whether the run in a folder has left nothing that starting anew would replace."""
    return (run_dir / RUN_ID).exists() and not any((run_dir / name).exists() for name in ("adapter", "model"))


def _has_broken(run_dir: Path) -> bool:
    checkpoints = run_dir / "checkpoints"
    return any(checkpoints.glob("broken-step-*")) or bool(published(checkpoints))  # the latter could not be moved
