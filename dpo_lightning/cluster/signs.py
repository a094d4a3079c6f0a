"""Signs of life that ranks leave for each other in a small store of the first rank's process."""

from __future__ import annotations

import json
import os
import socket
import statistics
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
NOTABLE = 0.05  # seconds; less is no reason to speak of a slow rank


class Sign(NamedTuple):
    """What a rank has last told of itself: beats count up as long as its process lives.

    point, step, number and seconds say where its main thread is and for how long; busy, how many seconds of a step it
    takes by itself; phase, what for.
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

    def __str__(self) -> str:
        """Return who and where, for a person."""
        where = f"{self.seconds:.0f} s after {self.point} of step {self.step}"
        return f"rank {self.rank} ({self.host}, pid {self.pid}), {where},"


class Signs:
    """One rank's access to the signs of all; of this process alone where there are no others."""

    def __init__(self, store: Any = None, rank: int = 0, world: int = 1):
        self.store, self.rank, self.world = store, rank, world
        self.busy, self.phase = 0.0, ""
        self._beats = 0

    @classmethod
    def meet(cls, trainer: pl.Trainer) -> Signs:
        """Open the store in the first rank's process and connect all others to it. Collective."""
        rank, world = trainer.global_rank, trainer.world_size
        if world == 1:
            return cls()
        talk: Any = torch.distributed
        host = socket.gethostname() if trainer.num_nodes > 1 else "127.0.0.1"
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
            self.store.set(str(self.rank), json.dumps(self.own()))

    def own(self) -> Sign:
        """Return this rank's sign."""
        place = points.here()
        seconds = time.monotonic() - place.since
        return Sign(
            self.rank, socket.gethostname(), os.getpid(), self._beats, place.point, place.step, place.number, seconds,
            self.busy, self.phase,
        )  # fmt: skip

    def all(self) -> list[Sign]:
        """Return what every rank has told last. Raises RuntimeError where the first rank does not answer."""
        if self.store is None:
            return [self.own()]
        return [Sign(*json.loads(self.store.get(str(rank)))) for rank in range(self.world)]

    def lost(self, ended: Callable[[], str]) -> str:
        """Return which ranks have ended, or give no sign of life any more; "" if all do. Listens for SILENT beats.

        `ended` tells of those that this process has started.
        """
        silent: list[Sign] = []
        try:
            before = self.all()
            for _ in range(SILENT if self.store is not None else 0):
                if told := ended():
                    return told
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
