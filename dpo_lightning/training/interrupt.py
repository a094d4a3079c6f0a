"""Ctrl-C ends the training at the next step's end, so that what there is can be saved and exported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

NOTE = b"\nstopping at the end of this step, then saving; Ctrl-C again kills\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(pl.Callback):
    """The first SIGINT or SIGTERM asks for a stop at the end of the step; a second Ctrl-C kills as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._step = 0

    @property
    def requested(self) -> bool:
        """Return whether a stop was asked for."""
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

    def on_sanity_check_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Take the signals back from Lightning, which exits with 0 on SIGTERM and saves nothing."""
        if not self.requested:
            self._take()

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Do the same where there was no validation before."""
        if not self.requested:
            self._take()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin no training after the validation before it."""
        if self.requested:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop where a step has ended, never within an accumulation."""
        if self.requested and trainer.global_step != self._step:
            trainer.should_stop = True
        self._step = trainer.global_step


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt like Ctrl-C, for work that can be left out."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
