"""The base model of a run: the same weights for its whole life, though checkpoints hold none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.checkpoints.folder import MANIFEST
from dpo_lightning.cluster.ranks import from_rank_0
from dpo_lightning.types import UserError


class Base(pl.Callback):
    """Notes in each checkpoint's manifest which weights its run has begun from, and goes on with no others.

    Args:
        digest: -> a text that changes with any of the base's weights, called on rank 0 once they are loaded.
        facts: what the manifests say; it gets the text as "base".
        resume: state file of the checkpoint that the run goes on from, if any.
        may_change: other weights are taken on purpose.

    """

    def __init__(self, digest: Callable[[], str], facts: dict[str, Any], resume: Path | None, may_change: bool):
        self.digest, self.facts, self.resume, self.may_change = digest, facts, resume, may_change

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise UserError, on every rank, where the weights are not those of the checkpoint."""
        now = from_rank_0(trainer, self.digest)
        then = json.loads((self.resume.parent / MANIFEST).read_bytes()).get("base") if self.resume is not None else None
        if then not in (None, now) and not self.may_change:  # None: of a version that did not note it
            raise UserError(
                f"model.name: its weights are not those that {self.resume} was trained on; bring those back, or "
                "resume_allow=[model.name] to go on with these on purpose"
            )
        self.facts["base"] = now
