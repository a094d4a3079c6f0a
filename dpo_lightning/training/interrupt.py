"""Ctrl-C ends the training at the next step's end, so that what there is can be saved and exported."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl


class Interrupt(pl.Callback):
    """The first SIGINT or SIGTERM asks for a stop at the end of the step; a second Ctrl-C kills as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._step = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over for a while."""
        previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave a validation early."""
        if self.requested:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop where a step has ended, never within an accumulation."""
        if self.requested and trainer.global_step != self._step:
            trainer.should_stop = True
        self._step = trainer.global_step
