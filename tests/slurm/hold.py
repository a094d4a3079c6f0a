"""Keeps every rank of a job at the end of one step, so that a test can do something to the job just there."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Hold(pl.Callback):
    """Waits at the end of `step` while `file` exists."""

    def __init__(self, file: str, step: int):
        self.file, self.step = Path(file), step

    def on_train_batch_end(self, trainer: Any, *args: Any):
        if trainer.global_step != self.step or not self.file.exists():
            return
        self.file.with_name(f"held-{trainer.global_rank}").touch()
        deadline = time.monotonic() + 250
        while self.file.exists():
            assert time.monotonic() < deadline, "nobody has let go"
            time.sleep(0.05)
