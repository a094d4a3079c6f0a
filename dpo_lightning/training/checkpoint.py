"""Checkpoints: a folder written aside, every file fsynced, a manifest of sha256 last, published by one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.training.interrupt import Interrupt
from dpo_lightning.types import UserError

STATE, MANIFEST = "state.ckpt", "manifest.json"


class Checkpoints(pl.Callback):
    """Saves every `every_n_steps` steps (None: never) and when the run is interrupted."""

    def __init__(self, run_dir: Path, every_n_steps: int | None, interrupt: Interrupt):
        self.folder, self.every_n_steps, self.interrupt = run_dir / "checkpoints", every_n_steps, interrupt
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the step that a resumed run starts from."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save at the end of a step that is due."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if step != self._step and (due or self.interrupt.requested):
            save(trainer, self.folder / f"step-{step:08d}")
        self._step = step


def save(trainer: pl.Trainer, folder: Path) -> None:
    """Write the trainer's state and publish it as `folder`; one that is already there is left as it is."""
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trainer.save_checkpoint(scratch / STATE)
    _sync(scratch / STATE)
    manifest = scratch / MANIFEST
    manifest.write_text(json.dumps({STATE: _digest(scratch / STATE)}))
    _sync(manifest)
    _sync(scratch)
    scratch.rename(folder)
    _sync(folder.parent)


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
        return all(_digest(folder / name) == digest for name, digest in manifest.items())
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


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
