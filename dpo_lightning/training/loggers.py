"""Where metrics go: metrics.jsonl always, and a csv file or W&B (`training/wandb_run.py`) besides.

None of them ends a training: what cannot be written is told, kept, and written later.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.metrics_file import METRICS, logged

log = logging.getLogger(__name__)

KEPT = 10_000  # rows that wait in memory for a disk that takes them


class JsonlLogger(Logger):
    """One JSON object per logged step, appended and flushed at once, so that a killed run keeps its curve.

    Rows that a full or lost disk refuses wait, up to KEPT of them, and follow in their order when it takes them again.
    """

    def __init__(self, run_dir: Path):
        super().__init__()
        self.path = run_dir / METRICS
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._fails = False

    @property
    def name(self) -> str:
        """Return the file's stem."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return nothing: there is one file a run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append {"step": step, **metrics}; null stands for what is not finite, for which JSON has no word."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._waiting.append((json.dumps({"step": step, **row}, allow_nan=False) + "\n").encode())
        if len(self._waiting) > KEPT:
            self._waiting.popleft()
            self._lost += 1
        self._write()

    def _write(self) -> None:
        """Append all that waits; say once that it cannot be, and once that it can again."""
        late = len(self._waiting)
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    append_whole(file, self._waiting[0])
                    self._waiting.popleft()
        except OSError as error:
            if not self._fails:
                log.warning("warning: %s cannot be written: %s; the training goes on, the rows wait", self.path, error)
            self._fails = True
            return
        if self._fails:
            log.info("%s is written again, with the %d rows that waited", self.path, late)
        self._fails = False

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, which a run resumed there logs again; make the file.

        Raises OSError, and UserError for a line that is no row.
        """
        rows = logged(self.path.parent) if self.path.exists() else []
        kept = [line for line, row in rows if row["step"] <= step]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(kept))
        scratch.replace(self.path)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Write a last time what waits; say how much is missing."""
        self._write()
        if missing := self._lost + len(self._waiting):
            log.warning("warning: %s lacks %d rows that could not be written", self.path, missing)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""


def append_whole(file: io.FileIO, row: bytes) -> None:
    """Write all of a row at the end of a file, or nothing: half a row would spoil the next. Raises OSError."""
    end = file.seek(0, os.SEEK_END)
    left = memoryview(row)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            file.truncate(end)
        raise


class PatientCSVLogger(CSVLogger):
    """Lightning's csv file; rows that the disk refuses stay in memory until the next time it is written."""

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged."""
        try:
            super().save()
        except OSError as error:
            log.warning("warning: %s/metrics.csv cannot be written: %s; the training goes on", self.log_dir, error)


def no_logger(run_dir: Path, config: dict[str, Any]) -> Sequence[Logger]:
    """Log to metrics.jsonl alone."""
    return []


def csv_logger(run_dir: Path, config: dict[str, Any]) -> Sequence[Logger]:
    """Write csv/version_N/metrics.csv into the run folder, a version for each start."""
    logger = PatientCSVLogger(run_dir, name="csv")
    _ = logger.experiment  # makes its folder now
    return [logger]


@contextmanager
def closed(trainer: pl.Trainer) -> Iterator[None]:
    """End the trainer's loggers at the end, whatever has happened: W&B's run takes the answers to prompts, too."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        for logger in trainer.loggers:
            if (close := getattr(logger, "close", None)) is not None:
                close(exit_code)
