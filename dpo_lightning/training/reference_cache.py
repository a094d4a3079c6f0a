"""The pass before the training that gives every pair its reference log-probabilities, most of them from the cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track

from dpo_lightning.data.batches import MicroBatch, PairTable, ValidationOrder
from dpo_lightning.data.reference_store import ReferenceStore
from dpo_lightning.model.logps import base_of
from dpo_lightning.training.interrupt import Interrupt

VERSION = 1  # part of the key: raise it when the same pair would get other log-probabilities


class ReferenceCache(pl.Callback):
    """Fills the data module's reference log-probabilities before anything is measured; all ranks compute together.

    Args:
        folder: of the store.
        weights_digest: -> digest of the reference's weights, called on rank 0.
        interrupt: ends the pass after a batch; what was computed is kept.

    """

    def __init__(self, folder: Path, weights_digest: Callable[[], str], interrupt: Interrupt):
        self.folder, self.weights_digest, self.interrupt = folder, weights_digest, interrupt

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look up every pair, compute the missing ones in order of length, and keep them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        keys = {name: data.keys(pairs.table) for name, pairs in data.pairs.items()}
        store: Any = trainer.strategy.broadcast(self._store(trainer, pl_module) if trainer.is_global_zero else None)
        began, missing = time.perf_counter(), 0
        for name, pairs in data.pairs.items():
            # Rank 0 decides what is missing: others may see a fuller file a moment later.
            known_N2: Any = trainer.strategy.broadcast(store.find(keys[name]) if trainer.is_global_zero else None)
            rows = np.flatnonzero(np.isnan(known_N2[:, 0]))
            missing += len(rows)
            if len(rows):
                order = ValidationOrder(data.lengths(pairs.table.select(rows)).sum(1), data.batch_size)
                batches = [MicroBatch(tuple(rows[list(micro.rows)].tolist()), 1) for micro in order]
                self._compute(trainer, pl_module, pairs, batches, keys[name], known_N2, store)
            pairs.reference_N2 = known_N2
        if trainer.is_global_zero:
            seconds = f" in {time.perf_counter() - began:.0f} s" if missing else ""
            print(f"reference: {missing} of {sum(map(len, keys.values()))} pairs computed{seconds}, the others cached")

    def _store(self, trainer: pl.Trainer, pl_module: Any) -> ReferenceStore:
        """Return the store of this reference under these numerics: nothing else may be part of its name."""
        embeddings = base_of(pl_module.policy).get_input_embeddings().weight
        numerics = {
            "version": VERSION, "weights": self.weights_digest(), "precision": trainer.precision,
            "stored": str(embeddings.dtype), "layout": pl_module.layout.split()[0],
            "device": trainer.strategy.root_device.type, "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:32]
        return ReferenceStore(self.folder / name)

    @torch.no_grad()
    def _compute(
        self, trainer: pl.Trainer, pl_module: Any, table: PairTable, batches: Sequence[MicroBatch], keys_N: np.ndarray,
        known_N2: np.ndarray, store: ReferenceStore,
    ) -> None:  # fmt: skip
        """Compute the batches, each rank its share, and write them into `known_N2` and the store."""
        device = trainer.strategy.root_device
        live = pl_module.reference.live(device)
        computed_N2 = torch.zeros(known_N2.shape, dtype=torch.float32, device=device)
        console = Console()
        rounds = range(trainer.global_rank, len(batches), trainer.world_size)
        silent = not (console.is_terminal and trainer.is_global_zero)
        for i in track(rounds, "reference", console=console, transient=True, disable=silent):
            if self.interrupt.requested:
                raise KeyboardInterrupt
            with trainer.precision_plugin.forward_context():
                logps = live.pair_logps(pl_module.policy, table[batches[i]].to(device))
            rows = list(batches[i].rows)
            logps_B2 = torch.stack([logps.chosen, logps.rejected], 1)
            store.append(keys_N[rows], logps_B2.cpu().numpy())
            computed_N2[rows] = logps_B2
        if trainer.world_size > 1:
            torch.distributed.all_reduce(computed_N2)
        rows = [row for batch in batches for row in batch.rows]
        known_N2[rows] = computed_N2.cpu().numpy()[rows]
