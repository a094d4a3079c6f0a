"""What a failing rank was at goes into the run's record of starts, for the next start and for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.checkpoints.starts import note
from dpo_lightning.cluster import points


class Failures(pl.Callback):
    """Notes an exception with rank, step and the training pairs that were under way."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Note what ends this rank; a Ctrl-C is no failure."""
        if isinstance(exception, KeyboardInterrupt):
            return
        text = f"{type(exception).__name__}: {next(iter(str(exception).splitlines()), '')}"
        pairs = pl_module.guard.rows[-1] if pl_module.guard.rows else []
        place = points.here()
        note(self.run_dir, failed=text, rank=trainer.global_rank, step=place.step, at=place.point, pairs=pairs)
