"""A rank that is killed, hangs or is slow is named, and a run that cannot go on ends: in bounded time, on every rank.

Each rank has a thread that tells the others, through a small store in the first rank's process, that its own process
lives and which of the run's named points (`cluster/points.py`) it has passed last. Nothing is asked of a GPU.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dpo_lightning.cluster import points
from dpo_lightning.cluster.exits import RANK_LOST
from dpo_lightning.cluster.interrupt import NOTES
from dpo_lightning.cluster.signs import BEAT, Signs, Unanswered, behind, slow

TALK = re.compile(r"gloo|nccl|socket|store|connection|broken pipe|peer", re.IGNORECASE)  # of failed collectives
GRACE = 10.0  # seconds that the main thread has to notice a failure by itself
LEAVING = 60.0  # seconds that it then has to end, and that a checkpoint has which is being written
LOOK = 5.0  # seconds between two looks for slow ranks
LOADING = 1800.0  # seconds that a model is given to load, and DeepSpeed to compile its operations, at the least
WINDOW = 10  # steps whose median counts: one that takes long is no slow rank


class Watchdog(pl.Callback):
    """Watches over the ranks while they train.

    Args:
        hang_seconds: a rank that passes no named point for so long ends the run; None: never.
        slow_factor: a rank that takes so many times the others' seconds for data and forward pass is told of, once.
        wait_for_save: seconds -> waits at most so long for the checkpoint that is being written.

    """

    def __init__(
        self, hang_seconds: float | None, slow_factor: float, wait_for_save: Callable[[float], None] = lambda _: None
    ):
        self.hang_seconds, self.slow_factor, self.wait_for_save = hang_seconds, slow_factor, wait_for_save
        self.signs = Signs()
        self._over, self._noticed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._children: list[Any] = []  # processes of other ranks
        self._ready = 0.0  # when there was a batch, by time.monotonic()
        self._waited = 0.0  # seconds for it
        self._own: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # seconds for data, for the forward pass
        self._told: set[int] = set()  # ranks that are slow
        self._place, self._stopped = points.here(), 0.0  # seconds that this process was stopped for, since that point

    def take_over(self, trainer: pl.Trainer) -> None:
        """Watch over the ranks that Lightning starts from this process as soon as it has.

        Lightning's own observer would kill this process by SIGKILL when one of them fails, without a word.
        """
        launcher: Any = trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        start = launcher._call_children_scripts

        def start_and_watch() -> None:
            try:
                start()
            finally:
                self._children, launcher.procs = launcher.procs, []  # the observer of none ends at once
            points.at("launch", 0)
            self._begin()

        launcher._call_children_scripts = start_and_watch  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Meet the other ranks and watch, before the model is loaded: a machine's memory may not hold it."""
        self.signs = Signs.meet(trainer)
        points.at("setup", trainer.global_step)
        self._begin()

    def _begin(self) -> None:
        """Begin to watch, where that has not begun."""
        if self._thread is None or self._over.is_set():
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(self._over,), name="watchdog", daemon=True)
            self._thread.start()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have a model."""
        points.at("data.next", trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Have a batch to work on."""
        self._ready, place = time.monotonic(), points.here()
        self._waited = self._ready - place.since if place.point == "data.next" else 0.0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Measure what this rank has taken by itself, since all have ended a step: then it waits for the others.

        It does so at the end of its forward pass, and under ZeRO-3 from its beginning on.
        """
        sharded = getattr(trainer.strategy, "zero_stage_3", False)
        own = pl_module.entered if sharded else points.here().since
        self._own.append((self._waited, own - self._ready))
        if len(self._own) == WINDOW:
            data, forward = (statistics.median(seconds) for seconds in zip(*self._own, strict=True))
            self.signs.busy, self.signs.phase = data + forward, "data" if data > forward else "forward pass"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer: export and report take what they take."""
        self.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the failure to the main thread; the others are to know whether it began here."""
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
        self.signs.failed = not stopped and not TALK.search(str(exception))
        self._noticed.set()

    def end(self) -> None:
        """Watch no longer; end the ranks that were started from here where they wait for this one and do not watch."""
        self._over.set()
        if self.signs.store is None:
            self._kill_children()

    def lost(self) -> str:
        """Return which ranks have ended or give no sign of life any more, in all ranks' words; "" where there are none.

        Takes up to ten beats, and three more on the first rank.
        """
        lost = self.signs.lost(self._ended)
        return self.signs.agree(lost) if lost else ""

    def _watch(self, over: threading.Event) -> None:
        """Beat, and look whether this rank gets on; the others are asked only if it does not."""
        looked = time.monotonic()
        while not self._rest(over):
            try:
                self.signs.tell()
                if why := self.signs.verdict():
                    self._give_up(why, 0)
                    return
                if self.signs.rank == 0 and time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    self._look_for_slow_ranks()
            except Unanswered:
                pass  # a stopped process may go on: hang_seconds says how long it has
            except RuntimeError as error:  # of the store, which lives in the first rank
                self._give_up(f"rank 0 cannot be reached any more ({str(error).splitlines()[0]})", GRACE)
                return
            if ended := self._ended():
                if self.signs.store is None and (number := self._stopped_by()):
                    self._leave(f"{signal.Signals(number).name} while the ranks were starting: {ended}", 128 + number)
                self._give_up(ended, GRACE)
                return
            if time.monotonic() - points.here().since - self._stopped > self._limit():
                self._give_up(self.signs.lost(self._ended) or self._behind(), 0)
                return

    def _rest(self, over: threading.Event) -> bool:
        """Wait for the next beat; return whether the watch is over.

        What it takes longer than that, this process was stopped, and its main thread with it: that is no hang.
        """
        began = time.monotonic()
        ends = over.wait(BEAT)
        late, place = max(0.0, time.monotonic() - began - BEAT), points.here()
        late = min(late, time.monotonic() - place.since)  # what lies before a point is not waited for there
        self._stopped = late + (self._stopped if place == self._place else 0.0)
        self._place = place
        return ends

    def _limit(self) -> float:
        """Return how many seconds may lie between two points; a model may take longer to load than a step."""
        limit = math.inf if self.hang_seconds is None else self.hang_seconds
        return max(limit, LOADING) if points.here().point in ("launch", "setup") else limit

    def _behind(self) -> str:
        try:
            return "; ".join(f"{sign} is behind" for sign in behind(self.signs.all()))
        except RuntimeError as error:
            return f"rank 0 does not answer ({str(error).splitlines()[0]})"

    def _ended(self) -> str:
        """Return which of the processes that this one has started have failed."""
        codes = [(number + 1, child.pid, child.poll()) for number, child in enumerate(self._children)]
        return "; ".join(
            f"rank {rank} (pid {pid}) has ended with exit code {code}" for rank, pid, code in codes if code
        )

    def _stopped_by(self) -> int:
        """Return the signal that has ended one of them before it could save anything, or 0.

        This process was sent it, too, or will be missed by the others; its main thread hears nothing while it waits.
        """
        codes = [child.poll() or 0 for child in self._children]
        return next((number for number in NOTES if -number in codes or 128 + number in codes), 0)

    def _look_for_slow_ranks(self) -> None:
        for sign, others in slow(self.signs.all(), self.slow_factor):
            if sign.rank not in self._told:
                self._told.add(sign.rank)
                with suppress(OSError):  # of a full disk, which must not end the watch
                    print(
                        f"warning: rank {sign.rank} ({sign.host}) is slow: data and forward pass take it "
                        f"{sign.busy:.2f} s a step, most of it the {sign.phase}; the other ranks {others:.2f} s, and "
                        "they wait for it", flush=True,
                    )  # fmt: skip

    def _give_up(self, why: str, grace: float) -> None:
        """End this process and those it has started: the main thread waits for what will not come."""
        if self._over.wait(grace):
            return
        if self._noticed.is_set() and self._over.wait(LEAVING):  # the main thread has noticed by itself, and ends
            return
        place, why = points.here(), self.signs.agree(why)
        told = (
            f"error: rank {self.signs.rank} has waited {time.monotonic() - place.since:.0f} s after {place.point} "
            f"of step {place.step}: {why}; the run ends with exit code {RANK_LOST}, and goes on from its last "
            "checkpoint when it is started again. The stacks of this rank:"
        )
        self._leave(told, RANK_LOST, stacks=True)

    def _leave(self, told: str, code: int, stacks: bool = False) -> NoReturn:
        """End this process and those it has started."""
        with suppress(OSError):  # of a full disk, which must not keep this process alive
            sys.stderr.write(f"{told}\n")
            sys.stderr.flush()
        if stacks:
            faulthandler.dump_traceback(all_threads=True)
        self._kill_children()
        self.wait_for_save(LEAVING)
        os._exit(code)

    def _kill_children(self) -> None:
        for child in self._children:
            child.kill()
