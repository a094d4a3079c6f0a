"""Checkpoints: when they are saved, and how Lightning's state reaches `checkpoints/writer.py` while training goes on.

`checkpoints/resume.py` reads them, `checkpoints/retention.py` deletes the older ones.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from dpo_lightning.checkpoints.folder import CONFIG, STATE, published
from dpo_lightning.checkpoints.retention import Verified, best_step, retain
from dpo_lightning.checkpoints.writer import publish
from dpo_lightning.cluster import points
from dpo_lightning.cluster.exits import StorageError
from dpo_lightning.cluster.interrupt import validation_is_due
from dpo_lightning.cluster.ranks import Words
from dpo_lightning.types import UserError

# what Lightning goes on from
HOLDS = ("pytorch-lightning_version", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers")
ANOTHER = "give resume=PATH of another checkpoint"
REFUSED = 3  # saves in a row that a disk may refuse before the run ends: what it trains would be lost with it


class Saver(CheckpointIO):
    """Writes a checkpoint's folder in a thread: a step waits for a copy of its state alone, not for the disk.

    Args:
        config: what the checkpoint's config.json holds.
        facts: what its manifest says besides: the run's id, pairs of a step.
        keep_last: how many are kept besides the best and the pinned ones; None for all.

    """

    def __init__(self, config: Mapping[str, Any], facts: dict[str, Any], keep_last: int | None):
        self.config, self.facts, self.keep_last = config, facts, keep_last
        self.seconds: float | None = None  # that the last save took, from the copy to the disk
        self.refused = 0  # saves in a row that the disk has refused
        self._is_whole = Verified()
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to write the folder `path`, as soon as the one before is done."""
        self.finish()
        began = time.monotonic()
        state = apply_to_collection(checkpoint, Tensor, _copy)
        step = checkpoint["global_step"]
        self._thread = Thread(target=self._write, args=(state, Path(path), step, began), name=f"checkpoint {step}")
        self._thread.start()

    def _write(self, state: dict[str, Any], folder: Path, step: int, began: float) -> None:
        at = partial(points.at, step=step)
        files = {
            STATE: lambda stream: torch.save(state, stream),
            CONFIG: lambda stream: stream.write(json.dumps(self.config).encode()),
        }
        try:
            publish(folder, files, {**self.facts, "step": step}, at=at)
        except OSError as error:  # costs this checkpoint, not the run; the older ones are whole
            self.refused += 1
            print(f"warning: checkpoint {step} cannot be saved: {error}", flush=True)
            return
        except Exception as error:
            self._error = error
            return
        if self.refused:
            print(f"checkpoint {step} is saved, after {self.refused} that were not", flush=True)
        self.refused, self.seconds = 0, time.monotonic() - began
        try:
            retain(folder.parent, self.keep_last, best_step(folder.parent.parent), at=at, is_whole=self._is_whole)
        except OSError as error:
            print(f"warning: an older checkpoint cannot be deleted: {error}", flush=True)

    def finish(self) -> None:
        """Wait for what is being written; raise what went wrong, unless it was the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, seconds: float) -> None:
        """Wait at most so long for what is being written."""
        if (thread := self._thread) is not None:
            thread.join(seconds)

    def check(self, checkpoints: Path, words: Words) -> None:
        """Raise StorageError, on every rank, where the disk has refused the first one too many saves in a row.

        `checkpoints` is their folder. Collective.
        """
        if (refused := words.highest(self.refused)) >= REFUSED:
            raise StorageError(f"{checkpoints}: {refused} checkpoints in a row could not be saved; {mend(checkpoints)}")

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Return a checkpoint's state. Nothing but tensors and plain values is unpickled, whatever is asked for."""
        points.at("load.mid")
        try:
            # mapped: each rank of a node reads what it keeps, and none holds a whole copy
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"resume: {path} holds more than tensors and plain values: it is not loaded") from error
        except RuntimeError as error:
            why = str(error).splitlines()[0].split(". ")[0]
            raise UserError(f"resume: {path} cannot be loaded ({why}); {ANOTHER}") from error
        lacking = [key for key in HOLDS if key not in state] if isinstance(state, dict) else HOLDS
        if lacking:
            raise UserError(f"resume: {path} is no state of a training: it holds no {', '.join(lacking)}; {ANOTHER}")
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Raise: `checkpoints/retention.py` alone deletes checkpoints."""
        raise NotImplementedError

    def teardown(self) -> None:
        """Finish before the process goes."""
        self.finish()


def mend(checkpoints: Path) -> str:
    """Return what to do when a disk has refused checkpoints, and what the run then goes on from."""
    left = published(checkpoints)
    then = f"goes on from {left[0].name}" if left else "starts anew, as there is no checkpoint"
    return f"free space or quota and start the run again: it {then}"


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


class Checkpoints(pl.Callback):
    """Saves every `every_n_steps` steps (None: never), at the end of each epoch, and where the training ends.

    Where a validation is due at the same step, it goes first: a run that is killed within it will make it again.
    """

    def __init__(self, run_dir: Path, every_n_steps: int | None, words: Words):
        self.folder, self.every_n_steps, self.words = run_dir / "checkpoints", every_n_steps, words
        self._step = self._saved = 0
        self._after_validation = False

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say where nothing is left to train. Lightning refuses a checkpoint of more epochs than are wanted now."""
        steps = checkpoint["global_step"]
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        for unit, made, limit in ("step", steps, trainer.max_steps), ("epoch", epochs, trainer.max_epochs):
            if limit is not None and 0 <= limit <= made and trainer.is_global_zero:
                told = f"the checkpoint is of {unit} {made}, trainer.max_{unit}s={limit}"
                print(f"nothing is left to train: {told}", flush=True)
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            trainer.fit_loop.max_epochs = max(trainer.max_epochs, epochs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the step that a resumed run starts from."""
        self._step = self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Save where a step has ended that is due; the end of an epoch saves by itself."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        saver: Any = trainer.strategy.checkpoint_io
        saver.check(self.folder, self.words)
        points.at("step.end", step)
        if self.every_n_steps is None or step % self.every_n_steps or trainer.is_last_batch:
            return
        if validation_is_due(trainer, batch_idx) and not trainer.should_stop:
            self._after_validation = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was due before the validation."""
        if self._after_validation:
            self._after_validation = False
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save an epoch that was gone through."""
        if trainer.is_last_batch:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step of a run that ends within an epoch: at max_steps, at a signal, at max_time."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = trainer.global_step
        points.at("save.gather", trainer.global_step)
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}")
