"""The pass before the training that gives every pair its reference log-probabilities, most of them from the cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import transformers

from dpo_lightning.cluster import points
from dpo_lightning.cluster.exits import WrongNumbers
from dpo_lightning.cluster.interrupt import Interrupt
from dpo_lightning.cluster.ranks import from_rank_0
from dpo_lightning.data.batches import MicroBatch, PairTable, of_like_length
from dpo_lightning.data.reference_store import ReferenceStore, look_up
from dpo_lightning.model.attention import kernel_for
from dpo_lightning.model.logps import base_of
from dpo_lightning.model.products import product_dtype

VERSION = 5  # part of the key: raise it when the same pair would get other log-probabilities
TOLD_EVERY = 60.0  # seconds between lines on a pass that takes long


class Work(NamedTuple):
    """One table's pairs: their keys, what is known of them, and the batches of those that are missing."""

    pairs: PairTable
    keys_N: np.ndarray
    known_N2: np.ndarray
    batches: Sequence[MicroBatch]
    ahead: int  # pairs that the run can meet

    @property
    def missing(self) -> list[int]:
        """Return the rows of the batches."""
        return [row for batch in self.batches for row in batch.rows]


class ReferenceCache(pl.Callback):
    """Fills the data module's reference log-probabilities before anything is measured; all ranks compute together.

    Args:
        folder: of the store.
        digest: -> digest of the reference's weights and configuration, called on rank 0.
        interrupt: ends the pass after a batch; what was computed is kept.

    """

    def __init__(self, folder: Path, digest: Callable[[], str], interrupt: Interrupt):
        self.folder, self.digest, self.interrupt = folder, digest, interrupt
        self.cannot_keep = self.warned = False
        self.computed = 0  # pairs, by all ranks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look up every pair that the run can meet, compute the missing ones, the longest first, and keep them."""
        began = time.perf_counter()
        pl_module.settle_layout()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        store = from_rank_0(trainer, lambda: self._store(trainer, pl_module))
        asked = set[bytes]()
        work = [self._look_up(trainer, data, name, store, asked) for name in data.pairs]
        missing, ahead = sum(len(part.missing) for part in work), sum(part.ahead for part in work)
        if missing:
            self._compute(trainer, pl_module, work, store)
        for part in work:
            part.pairs.reference_N2 = part.known_N2
        if trainer.is_global_zero:
            seconds = f" in {time.perf_counter() - began:.0f} s" if missing else ""
            print(f"reference: {missing} of {ahead} pairs computed{seconds}, the others cached")

    def _store(self, trainer: pl.Trainer, pl_module: Any) -> ReferenceStore:
        """Return the store of this reference under these numerics: nothing else may be part of its name."""
        base, device = base_of(pl_module.policy), trainer.strategy.root_device
        embeddings = base.get_input_embeddings().weight
        layout = pl_module.layout.split()[0]
        kind = "16" in str(trainer.precision)
        numerics = {
            "version": VERSION, "weights": self.digest(), "precision": trainer.precision,
            "stored": str(embeddings.dtype), "layout": layout, "device": device.type,
            "attention": kernel_for(device.type, torch.bfloat16 if kind else torch.float32) if layout == "shared"
            else base.dpo_stock_attention,
            "products": str(product_dtype(torch.bfloat16 if kind else torch.float32, device.type)),
            "autocast": _autocast(trainer, device.type), "matmul": torch.get_float32_matmul_precision(),
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:32]
        return ReferenceStore(self.folder / name)

    def _look_up(self, trainer: pl.Trainer, data: Any, name: str, store: ReferenceStore, asked: set[bytes]) -> Work:
        """Return what is to be done for a table; `asked` are the pairs that other rows have asked for before."""
        pairs = data.pairs[name]
        keys_N = data.keys(pairs.table)
        # Rank 0 decides what is missing: others may see a fuller file a moment later.
        known_N2 = from_rank_0(trainer, lambda: self._found(store, keys_N))
        ahead = data.rows_ahead(name)
        keys = {int(row): bytes(keys_N[row]) for row in ahead[np.isnan(known_N2[ahead, 0])]}
        once = {key: row for row, key in reversed(keys.items()) if key not in asked}
        rows = np.sort(np.array([*once.values()], int))
        asked.update(once)
        batches: list[MicroBatch] = []
        if len(rows):
            alike = of_like_length(data.lengths(pairs.table.select(rows)).sum(1), data.batch_size)
            batches = [MicroBatch(tuple(rows[list(at)].tolist()), 1) for at in alike]
        return Work(pairs, keys_N, known_N2, batches[::-1], len(ahead))

    @torch.no_grad()
    def _compute(self, trainer: pl.Trainer, pl_module: Any, work: Sequence[Work], store: ReferenceStore) -> None:
        """Compute the batches, each rank its share in the same number of rounds, as sharded models demand."""
        device, world = trainer.strategy.root_device, trainer.world_size
        # Where a checkpoint is restored later on, as under DeepSpeed, the policy still is the reference.
        itself = trainer.strategy.restore_checkpoint_after_setup
        live = pl_module.reference.live(device, itself)
        told, done = time.perf_counter(), 0
        computed = [torch.zeros(part.known_N2.shape, device=device) for part in work]
        todo = [(n, batch) for n, part in enumerate(work) for batch in part.batches]
        for first in range(0, len(todo), world):
            if self.interrupt.heard():
                raise KeyboardInterrupt
            mine = first + trainer.global_rank < len(todo)
            n, batch = todo[first + trainer.global_rank if mine else first]
            points.at("reference.batch")
            with trainer.precision_plugin.forward_context():
                logps = live.pair_logps(pl_module.policy, work[n].pairs[batch].to(device))
            rows = list(batch.rows)
            if mine:
                computed[n][rows] = torch.stack([logps.chosen, logps.rejected], 1)
                self._keep(store, work[n].keys_N[rows], computed[n][rows].cpu().numpy())
            done += sum(len(batch.rows) for _, batch in todo[first : first + world])
            self.computed = done
            if trainer.is_global_zero and time.perf_counter() - told > TOLD_EVERY:
                told = time.perf_counter()
                print(f"reference: {done} of {sum(len(part.missing) for part in work)} missing pairs done", flush=True)
        for part, own_N2 in zip(work, computed, strict=True):
            if world > 1:
                torch.distributed.all_reduce(own_N2)
            rows = part.missing
            part.known_N2[rows] = own_N2.cpu().numpy()[rows]
            if trainer.num_nodes > 1 and trainer.local_rank == 0:  # this node's cache may be its own
                lacking = np.isnan(self._found(store, part.keys_N[rows])[:, 0])
                self._keep(store, part.keys_N[rows][lacking], part.known_N2[rows][lacking])
        _spread(work)

    def _found(self, store: ReferenceStore, keys_N: np.ndarray) -> np.ndarray:
        """Read from the store; where somebody else's may not be read, nothing is known."""
        try:
            return store.find(keys_N)
        except OSError as error:
            self._warn(f"read: {error}")
            return np.full((len(keys_N), 2), np.nan, np.float32)

    def _keep(self, store: ReferenceStore, keys_N: np.ndarray, logps_N2: np.ndarray) -> None:
        """Write into the store; a full or read-only disk costs the next run its time, not this one its life."""
        try:
            store.append(keys_N, logps_N2)
        except ValueError as error:
            raise WrongNumbers(str(error)) from error
        except OSError as error:
            self._warn(f"kept: {error}")
            self.cannot_keep = True

    def _warn(self, text: str) -> None:
        if not self.warned:
            print(f"warning: the reference's log-probabilities cannot be {text}", flush=True)
        self.warned = True


def _spread(work: Sequence[Work]) -> None:
    """Give rows that repeat a pair what one of them was computed to have."""
    known_K = np.concatenate([part.keys_N[part.missing] for part in work])
    logps_K2 = np.concatenate([part.known_N2[part.missing] for part in work])
    for part in work:
        rows = np.flatnonzero(np.isnan(part.known_N2[:, 0]))
        part.known_N2[rows] = look_up(part.keys_N[rows], known_K, logps_K2)


def _autocast(trainer: pl.Trainer, kind: str) -> bool:
    """Return whether the precision is torch's autocast; DeepSpeed's rounds the whole model instead."""
    with trainer.precision_plugin.forward_context():
        return torch.is_autocast_enabled(kind)
