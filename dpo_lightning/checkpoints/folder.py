"""A checkpoint's folder: its name, its manifest, and whether both are whole. Imports nothing heavy.

`checkpoints/writer.py` publishes them: RUN_DIR/checkpoints/step-00000012 whose manifest.json is
{"step": 12, "run": ID, ..., "files": {name: {"bytes": n, "sha256": hex}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STATE, CONFIG, MANIFEST = "state.ckpt", "config.json", "manifest.json"
RUN_ID = "run_id"  # of a run's folder
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a file in a checkpoint's folder, never a path out of it


def published(checkpoints: Path) -> list[Path]:
    """Return the folders named step-NUMBER, the newest first. A symlink is none: it may lead to another run's."""
    return _numbered(checkpoints, lambda path: path.is_dir() and not path.is_symlink())


def links(checkpoints: Path) -> list[Path]:
    """Return the symlinks named step-NUMBER, the newest first, wherever they lead."""
    return _numbered(checkpoints, Path.is_symlink)


def _numbered(checkpoints: Path, holds: Callable[[Path], bool]) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    numbers = {path: step_number(path) for path in checkpoints.iterdir() if holds(path)}
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


def verify(folder: Path) -> str | None:
    """Return None where the manifest is this folder's and every file has its size and sha256, else what is wrong.

    Raises PermissionError where a file may not be read: it may be whole.
    """
    file = folder / MANIFEST
    if (reason := _absence(file)) is not None:
        return reason
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        return _unread(MANIFEST, error)
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
        return _unread(file.name, error)
    return None


def _absence(file: Path) -> str | None:
    """Tell of what is not there, and of what opening would wait on or fail at: a pipe, a folder."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{file.name} is missing"
    except OSError as error:
        return _unread(file.name, error)
    return None if file.is_file() else f"{file.name} is not a file"


def _unread(name: str, error: OSError) -> str:
    """Tell of a file that the disk does not give; raise the error where it is the account that may not read it."""
    if isinstance(error, PermissionError):
        raise error
    return f"{name} cannot be read: {error.strerror}"


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
