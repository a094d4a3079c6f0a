"""All ranks train the same: folder, configuration, data and checkpoint, as the first rank decides."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dpo_lightning.cluster.ranks import gather_texts
from dpo_lightning.types import UserError


class Agreement(pl.Callback):
    """Compares what the ranks are about to do, before any model is built; `begin` is what the first does then."""

    def __init__(self, plan: Mapping[str, Any], begin: Callable[[pl.Trainer], None]):
        self.plan, self.begin, self.begun = plan, begin, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise UserError, on every rank, if one differs from the first; the text names the first key that does."""
        plans = [json.loads(text) for text in gather_texts(json.dumps(self.plan), trainer.strategy.root_device)]
        for rank, plan in enumerate(plans):
            for key in {**plans[0], **plan}:
                first, other = plans[0].get(key), plan.get(key)
                if first != other:
                    raise UserError(f"{key}: {first} on rank 0, {other} on rank {rank}; start every rank alike")
        if trainer.is_global_zero and not self.begun:
            self.begin(trainer)
        self.begun = True


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain values under dotted names.

    >>> flat({"loss": {"beta": 0.1}, "seed": 1})
    {'loss.beta': 0.1, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def decided_by_rank_0(run_dir: Path, resume: Path | None) -> tuple[Path, Path | None]:
    """Return the first rank's run folder and checkpoint where torchrun has started the ranks, each by itself.

    A dated folder is another one for each process, and a checkpoint may appear between two looks. Processes that
    Lightning starts read the choice from their environment, SLURM's have a folder named after the job.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return run_dir, resume
    talk: Any = torch.distributed
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = talk.PrefixStore(
        f"dpo_lightning/{os.environ['TORCHELASTIC_RESTART_COUNT']}", talk.TCPStore(*where, is_master=False)
    )
    if os.environ["RANK"] == "0":
        store.set("start", json.dumps([str(run_dir), resume and str(resume)]))
    run, checkpoint = json.loads(store.get("start"))
    return Path(run), Path(checkpoint) if checkpoint else None
