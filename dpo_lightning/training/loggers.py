"""Where metrics go: metrics.jsonl always, and W&B or a csv file besides. wandb is imported here alone."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.training.resume import run_id

log = logging.getLogger(__name__)


class JsonlLogger(Logger):
    """One JSON object per logged step, appended and flushed at once, so that a killed run keeps its curve."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.path = run_dir / "metrics.jsonl"

    @property
    def name(self) -> str:
        """Return the file's stem."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return nothing: there is one file a run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append {"step": step, **metrics}."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a run resumed there logs it again."""
        if not self.path.exists():
            return
        rows = self.path.read_text().splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(kept))
        scratch.replace(self.path)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""


def no_logger(run_dir: Path, config: dict[str, Any]) -> Sequence[Logger]:
    """Log to metrics.jsonl alone."""
    return []


def csv_logger(run_dir: Path, config: dict[str, Any]) -> Sequence[Logger]:
    """Write csv/version_N/metrics.csv into the run folder, a version for each start."""
    return [CSVLogger(run_dir, name="csv")]


def wandb_logger(
    run_dir: Path,
    config: dict[str, Any],
    *,
    project: str,
    entity: str | None,
    name: str | None,
    tags: Sequence[str],
) -> Sequence[Logger]:
    """Log to Weights & Biases, offline by itself when there is no key. It never stops a run."""
    if "WANDB_MODE" not in os.environ and not _has_key():
        os.environ["WANDB_MODE"] = "offline"
        log.info("no W&B key: logging offline; later: wandb sync %s/wandb/offline-run-*", run_dir)
    os.environ.setdefault("WANDB_SILENT", "true")
    sweep = "WANDB_SWEEP_ID" in os.environ  # then W&B itself names project and run
    named = {} if sweep else {"project": project, "entity": entity, "name": name or run_dir.name, "id": run_id(run_dir)}
    logger = WandbLogger(save_dir=run_dir, tags=list(tags), config=config, **named)
    try:
        _ = logger.experiment
    except Exception as error:  # a wrong key, no network, a full disk: none is a reason to lose the training
        log.warning("W&B cannot be started (%s); the run goes on with metrics.jsonl alone", error)
        return []
    return [logger]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text()


def finish() -> None:
    """Close a W&B run, so that the next one of the same process does not go on in it."""
    import sys

    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()
