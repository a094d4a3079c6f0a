"""Signs of life that ranks leave for each other in a small store of the first rank's process."""

from __future__ import annotations

import json
import os
import queue
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from dpo_lightning.cluster import points
from dpo_lightning.cluster.ranks import gather_texts

BEAT = 1.0  # seconds between two signs of life
SILENT = 10  # beats without one
ANSWER = timedelta(seconds=10)  # that the store is given
VERDICT = "verdict"  # the store's key for why the run ends
READ = 3  # beats in which every rank has read it
NOTABLE = 0.05  # seconds; less is no reason to speak of a slow rank


class Sign(NamedTuple):
    """What a rank has last told of itself: beats count up as long as its process lives.

    point, step, number and seconds say where its main thread is and for how long; busy, how many seconds of a step it
    takes by itself; phase, what for; failed, that it has failed by itself and is ending.
    """

    rank: int
    host: str
    pid: int
    beats: int
    point: str
    step: int
    number: int
    seconds: float
    busy: float
    phase: str
    failed: bool = False

    def __str__(self) -> str:
        """Return who and where, for a person."""
        where = f"{self.seconds:.0f} s after {self.point} of step {self.step}"
        return f"rank {self.rank} ({self.host}, pid {self.pid}), {where},"


class Unanswered(RuntimeError):
    """The store has not answered in time: its process is stopped, or its machine cannot be reached."""


class Patient:
    """A store whose every call ends: a process that is stopped keeps its connections open, and answers nothing.

    Calls are made one after the other, each in a thread of its own; none is made while one is unanswered.
    """

    def __init__(self, store: Any):
        self.store = store
        self._one_at_a_time = threading.Lock()
        self._asked: threading.Thread | None = None

    def call(self, name: str, *args: Any) -> Any:
        """Return what the store's method gives. Raises what it raises, and Unanswered after ANSWER."""
        with self._one_at_a_time:
            if self._asked is not None:
                self._asked.join(ANSWER.total_seconds())
                if self._asked.is_alive():
                    raise Unanswered(f"no answer in {ANSWER.total_seconds():.0f} s")
            outcomes: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

            def ask() -> None:
                try:
                    outcomes.put((getattr(self.store, name)(*args), None))
                except Exception as error:
                    outcomes.put((None, error))

            self._asked = threading.Thread(target=ask, name="signs", daemon=True)
            self._asked.start()
            try:
                answer, error = outcomes.get(timeout=ANSWER.total_seconds())
            except queue.Empty:
                raise Unanswered(f"no answer in {ANSWER.total_seconds():.0f} s") from None
        if error is not None:
            raise error
        return answer


class Signs:
    """One rank's access to the signs of all; of this process alone where there are no others."""

    def __init__(self, store: Any = None, rank: int = 0, world: int = 1):
        self.store, self.rank, self.world = store and Patient(store), rank, world
        self.busy, self.phase, self.failed = 0.0, "", False
        self._beats = 0

    @classmethod
    def meet(cls, trainer: pl.Trainer) -> Signs:
        """Open the store in the first rank's process and connect all others to it. Collective."""
        rank, world = trainer.global_rank, trainer.world_size
        if world == 1:
            return cls()
        talk: Any = torch.distributed
        # Where the ranks have met already: the name that a host gives itself need not be known to others.
        host = (os.environ.get("MASTER_ADDR") or socket.gethostname()) if trainer.num_nodes > 1 else "127.0.0.1"
        own = talk.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        address = json.dumps([host, own.port]) if own is not None else ""
        host, port = json.loads(gather_texts(address, trainer.strategy.root_device)[0])
        store = own or talk.TCPStore(host, port, is_master=False, timeout=ANSWER)
        store.set_timeout(ANSWER)
        signs = cls(store, rank, world)
        signs.tell()
        return signs

    def tell(self) -> None:
        """Leave a sign of life. Raises RuntimeError where the first rank's process is gone."""
        self._beats += 1
        if self.store is not None:
            self.store.call("set", str(self.rank), json.dumps(self.own()))

    def verdict(self) -> str:
        """Return why the run ends, or "" while it goes on. Raises RuntimeError where the first rank is gone."""
        if self.store is None or not self.store.call("check", [VERDICT]):
            return ""
        return self.store.call("get", VERDICT).decode()

    def agree(self, why: str) -> str:
        """Tell all ranks why the run ends; return the words of the one that was first, which are everyone's.

        The first rank, whose process holds the store, stays until the others have had the time to read them; where it
        is gone, each keeps its own.
        """
        if self.store is None:
            return why
        try:
            told = self.store.call("compare_set", VERDICT, "", why).decode()
            for _ in range(READ if self.rank == 0 else 0):
                time.sleep(BEAT)
                self.tell()
        except RuntimeError:
            return why
        return told

    def own(self) -> Sign:
        """Return this rank's sign."""
        place = points.here()
        seconds = time.monotonic() - place.since
        return Sign(
            self.rank, socket.gethostname(), os.getpid(), self._beats, place.point, place.step, place.number, seconds,
            self.busy, self.phase, self.failed,
        )  # fmt: skip

    def all(self) -> list[Sign]:
        """Return what every rank has told last. Raises RuntimeError where the first rank does not answer."""
        if self.store is None:
            return [self.own()]
        return [Sign(*json.loads(self.store.call("get", str(rank)))) for rank in range(self.world)]

    def lost(self, ended: Callable[[], str]) -> str:
        """Return which ranks have ended, or give no sign of life any more; "" if all do. Listens for SILENT beats.

        `ended` tells of those that this process has started. Where a rank has told before why the run ends, so it is.
        """
        silent: list[Sign] = []
        try:
            before = self.all()
            for _ in range(SILENT if self.store is not None else 0):
                if told := self.verdict() or ended():
                    return told
                if failed := [sign for sign in self.all() if sign.failed and sign.rank != self.rank]:
                    return "; ".join(f"{sign} has failed" for sign in failed)
                time.sleep(BEAT)
                self.tell()
                silent = [then for then, now in zip(before, self.all(), strict=True) if then.beats == now.beats]
                if not silent:
                    return ""
        except RuntimeError as error:
            return f"rank 0 cannot be reached any more ({str(error).splitlines()[0]})"
        return ended() or "; ".join(f"{sign} gives no sign of life" for sign in silent)


def behind(signs: Sequence[Sign]) -> list[Sign]:
    """Return the ranks that have come less far than others: those that the others wait for; all, where none has.

    >>> a = Sign(0, "n1", 7, 9, "backward.begin", 4, 3, 60.0, 0.1, "data")
    >>> [sign.rank for sign in behind([a, a._replace(rank=1, point="step.begin", number=1)])]
    [1]
    """
    first = min((sign.step, sign.number) for sign in signs)
    return [sign for sign in signs if (sign.step, sign.number) == first]


def slow(signs: Sequence[Sign], factor: float) -> list[tuple[Sign, float]]:
    """Return the ranks that take more than `factor` times the others' median, with that median in seconds.

    >>> a = Sign(0, "n1", 7, 9, "step.begin", 4, 1, 0.0, 0.1, "data")
    >>> [(sign.rank, others) for sign, others in slow([a, a._replace(rank=1, busy=0.5)], 2)]
    [(1, 0.1)]
    """
    found = []
    for sign in signs:
        others = [other.busy for other in signs if other.rank != sign.rank and other.busy]
        median = statistics.median(others) if others else sign.busy
        if sign.busy > factor * median and sign.busy - median > NOTABLE:
            found.append((sign, median))
    return found
