"""A signal, or the end of a job's time, ends the training at the next step's end: what there is can be saved.

Lightning's own handlers are never installed: its SIGTERM handler talks to the other ranks from within the
signal and ends with 0, its SLURM handler saves between any two instructions.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.cluster.exits import INTERRUPTED
from dpo_lightning.cluster.ranks import Words

NOTES = {
    signal.SIGHUP: b"\nthe terminal was closed: stopping at the end of this step, then saving\n",
    signal.SIGINT: b"\nstopping at the end of this step, then saving; Ctrl-C again kills\n",
    signal.SIGTERM: b"\nSIGTERM: stopping at the end of this step, then saving\n",
    signal.SIGUSR1: b"\nSIGUSR1: stopping at the end of this step, then saving; the run goes on when started again\n",
}
COMPLETE = b"\nthe last step has been made: the run comes to its end; Ctrl-C again kills\n"
UNMEASURED = 60.0  # seconds that a first save is given


class Interrupt(pl.Callback):
    """The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 of any rank stops all of them at the end of the same step.

    SIGUSR1 leaves the run to be gone on with, the others end it; SIGHUP does nothing under nohup. What comes after the
    first changes nothing, except for a second Ctrl-C before the ranks have agreed to stop, which kills.

    Args:
        end_of_job: when the scheduler will end the job, in seconds since the epoch; asked on the first rank.
        save_seconds: -> what the last save took, None where there was none.

    """

    def __init__(
        self,
        end_of_job: Callable[[], float | None] = lambda: None,
        save_seconds: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.signal: int | None = None
        self.stopping = False  # what all ranks have agreed upon at the last step's end
        self.complete = False  # the run has come to its end, or will without a further start
        self.words = Words()
        self._end_of_job, self._save_seconds = end_of_job, save_seconds
        self._end: float | None = None
        self._interrupted = False
        self._left_out = False
        self._step = 0
        self._since, self._longest = time.monotonic(), 0.0  # of a step, in seconds
        self._validating_since, self._longest_validation = time.monotonic(), 0.0

    @property
    def requested(self) -> bool:
        """Return whether a stop was asked for, of this process."""
        return self.signal is not None

    @property
    def goes_on(self) -> bool:
        """Return whether the run stopped before its end to be started again."""
        return self.signal == signal.SIGUSR1 and not self.complete

    @property
    def exit_code(self) -> int:
        """Return the shell's code for the signal that came, or 0: also where the run had come to its end."""
        return 128 + self.signal if self.signal is not None and not self.complete else 0

    def heard(self) -> int:
        """Return the signal that any rank was sent, which is now everyone's, or 0. Collective."""
        if number := self.words.highest(self.signal or 0):
            self.signal = number
        return number

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over for a while."""
        previous = {number: signal.getsignal(number) for number in NOTES}
        self._take()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let the next signal raise KeyboardInterrupt, for work that can be left out; what comes after it does not."""

        def stop(number: int, frame: Any) -> None:
            self._take()
            raise KeyboardInterrupt

        for number in _heeded():
            signal.signal(number, stop)
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        for number in _heeded():
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        again = self._interrupted and number == signal.SIGINT
        self._interrupted |= number == signal.SIGINT
        if self.signal is None:
            self.signal = number
            with suppress(OSError):  # a log on a full disk, a pipe that nobody reads: the step goes on
                # print may be what the signal has interrupted
                os.write(2, COMPLETE if self.complete else NOTES[signal.Signals(number)])
        elif again and not self.stopping:
            os._exit(INTERRUPTED)  # checkpoints are published by one rename: none is torn

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Have Lightning take no signals, as it would before it trains and before it validates."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Measure the validation's time."""
        self._validating_since = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin no training that is not wanted any more."""
        if trainer.is_global_zero:
            self._end = self._end_of_job()
        self._step, self._since = trainer.global_step, time.monotonic()
        self._agree(trainer, self._left_out)
        if self.stopping:
            _stop(trainer)
        elif self._left_out:
            self._left_out = False
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: whether a validation was due that a signal has left out."""
        return {"validation_left_out": self._left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._left_out = state_dict["validation_left_out"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # fmt: skip
        """Stop where a step has ended, never within an accumulation, and all ranks at the same one."""
        if trainer.global_step == self._step:
            return
        self._step, now = trainer.global_step, time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now
        due = validation_is_due(trainer, batch_idx)
        self._agree(trainer, due)
        if self.stopping:
            self._left_out = due
            _stop(trainer)
            trainer.limit_val_batches = 0  # a validation may take longer than there is time

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave the validation out of the next step's time."""
        self._since = time.monotonic()
        self._longest_validation = max(self._longest_validation, self._since - self._validating_since)

    def _agree(self, trainer: pl.Trainer, validation_is_next: bool) -> None:
        """Make the signal of one rank that of all."""
        if self.signal is None and self._no_time_left(validation_is_next):
            self.signal = signal.SIGUSR1
            print("the job's time is nearly over: saving; the run goes on when started again", flush=True)
        number = self.heard()
        self.stopping = bool(number)
        # SIGUSR1 leaves the last validation and the export to the next start
        self.complete = trainer.global_step >= trainer.estimated_stepping_batches and number != signal.SIGUSR1

    def _no_time_left(self, validation_is_next: bool) -> bool:
        """Return whether what comes next, one more step at least, could leave too little time for the save after it."""
        saving = self._save_seconds()
        needed = 2 * (UNMEASURED / 2 if saving is None else saving) + 2 * self._longest + 5
        if validation_is_next:
            needed += 1.2 * self._longest_validation
        return self._end is not None and time.time() + needed > self._end


def _heeded() -> list[signal.Signals]:
    """Return the signals that are taken over: a SIGHUP that nohup has turned off stays so."""
    return [number for number in NOTES if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _stop(trainer: pl.Trainer) -> None:
    """Have Lightning stop, whatever trainer.min_epochs and trainer.min_steps demand."""
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = None
    trainer.fit_loop.epoch_loop.min_steps = None


def validation_is_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether Lightning will validate once the batch of this number in its epoch has ended."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    in_this_epoch = epochs is None or (trainer.current_epoch + 1) % epochs == 0
    return trainer.enable_validation and in_this_epoch and isinstance(every, int) and (batch_idx + 1) % every == 0
