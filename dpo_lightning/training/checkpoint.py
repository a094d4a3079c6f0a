"""Checkpoints: a folder written aside, every file fsynced, a manifest of sha256 last, published by one rename.

`training/resume.py` reads them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.training.interrupt import Interrupt
from dpo_lightning.training.resume import MANIFEST, STATE, digest


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
    manifest.write_text(json.dumps({STATE: digest(scratch / STATE)}))
    _sync(manifest)
    _sync(scratch)
    scratch.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
