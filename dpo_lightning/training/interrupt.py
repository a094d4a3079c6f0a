"""Ctrl-C ends the training at the next step's end, so that what there is can be saved and exported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch

NOTE = b"\nstopping at the end of this step, then saving; Ctrl-C again kills\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(pl.Callback):
    """The first SIGINT or SIGTERM asks for a stop at the end of the step; a second Ctrl-C kills as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopping = False  # what all ranks have agreed upon at the last step's end
        self._step = 0
        self._group: Any = None  # of gloo: signals reach CPUs

    @property
    def requested(self) -> bool:
        """Return whether a stop was asked for, of this process."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return the shell's code for the signal that came, or 0."""
        return 128 + self.signal if self.signal is not None else 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over for a while."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._take()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        os.write(2, NOTE)  # print may be what the signal has interrupted, and cannot be entered twice
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Take the signals back from Lightning, which exits with 0 on SIGTERM and saves nothing."""
        if not self.requested:
            self._take()

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Take the signals where there was no validation before; begin no training that is not wanted any more."""
        if not self.requested:
            self._take()
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        self._step = trainer.global_step
        self._agree()
        trainer.should_stop = trainer.should_stop or self.stopping

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop where a step has ended, never within an accumulation, and all ranks at the same one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._agree()
        if self.stopping:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # a validation may take longer than there is time

    def wait_for_all(self) -> None:
        """Wait for the first rank's export: launchers kill it when another rank has gone with an exit code."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def _agree(self) -> None:
        """Make the signal of one rank that of all: a word between CPUs, no wait for a GPU."""
        if self._group is not None:
            number = torch.tensor([self.signal or 0])
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
            self.signal = int(number) or self.signal
            self.stopping = bool(number)
        else:
            self.stopping = self.requested


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt like Ctrl-C, for work that can be left out."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
