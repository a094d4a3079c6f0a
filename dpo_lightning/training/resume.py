"""Which checkpoint a run goes on from. Imports nothing heavy: the answer comes before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dpo_lightning.types import UserError

STATE, MANIFEST = "state.ckpt", "manifest.json"


def newest(run_dir: Path) -> Path | None:
    """Return the state file of the newest checkpoint whose files are whole, or None where there is none."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        if is_whole(folder):
            return folder / STATE
        print(f"skipping {folder}: it does not match its manifest")
    return None


def is_whole(folder: Path) -> bool:
    """Return whether every file is there, with the content its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(digest(folder / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError):
        return False


def to_resume(resume: str, run_dir: Path) -> Path | None:
    """Return the state file that `resume` names, or None to start anew; never overwrite a run."""
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not is_whole(folder):
            raise UserError(
                f"resume={resume}: not a whole checkpoint; give a folder like RUN_DIR/checkpoints/step-00000012"
            )
        return folder / STATE
    found = newest(run_dir) if resume == "auto" else None
    if found is None and _has_trained(run_dir):
        raise UserError(
            f"run_dir={run_dir}: holds a run, and no checkpoint to go on from; choose another folder or remove it"
        )
    return found


def _has_trained(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"train/loss"' in metrics.read_text()


def step_of(state: Path) -> int:
    """Return the step that a checkpoint's state file was saved at."""
    return int(state.parent.name.removeprefix("step-"))


def digest(file: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
