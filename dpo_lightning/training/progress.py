"""The bar that runs while it trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from dpo_lightning.training.metric_log import MetricLog

SHOWN = {
    "train/loss": "loss",
    "train/rewards/accuracies": "accuracy",
    "train/rewards/margins": "margin",
    "perf/pairs_per_second": "pairs/s",
}


class ProgressBar(RichProgressBar):
    """Rich's bar with loss, reward accuracy, margin and pairs per second."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        latest = next((c.latest for c in trainer.callbacks if isinstance(c, MetricLog)), {})  # type: ignore[attr-defined]
        return {short: f"{latest[name]:.3f}" for name, short in SHOWN.items() if name in latest}
