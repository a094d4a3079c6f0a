"""Reads the module's meters once per logging interval and hands the means to every logger."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dpo_lightning.cluster import points
from dpo_lightning.cluster.ranks import from_rank_0, over_ranks
from dpo_lightning.metrics_file import logged
from dpo_lightning.model.flops import MatmulPeak, PairFlops
from dpo_lightning.model.padded import positions
from dpo_lightning.types import Batch


class MetricLog(pl.Callback):
    """Logs training means each `log_every_n_steps` steps, validation means after each validation.

    `latest` holds what was logged last, for the progress bar; `validations` all validation means, by step.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.validations: list[dict[str, float]] = []
        self._logged_step = 0
        self._since = self._paused = time.perf_counter()
        self._work = torch.zeros(4, dtype=torch.float64)  # pairs, tokens, positions, FLOPs of this rank
        self._needed: PairFlops | None = None
        self._peak: MatmulPeak | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock after set-up and first validation."""
        self._logged_step = trainer.global_step
        self._needed = PairFlops.of(pl_module.policy)
        if self._needed is not None:
            device, precision = pl_module.device, str(trainer.precision)
            kinds = {"bf16": torch.bfloat16, "16": torch.float16 if device.type == "cuda" else torch.bfloat16}
            self._peak = MatmulPeak(device, kinds.get(precision.partition("-")[0], torch.float32))
        self._restart(time.perf_counter())

    def _restart(self, now: float) -> None:
        self._since = now
        self._work.zero_()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count; at the end of a step that is to be logged, log."""
        if batch.counted:
            self._work += torch.tensor(self._work_of(pl_module, batch), dtype=torch.float64)
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._logged_step and step % every == 0:
            self._log_training(trainer, pl_module)

    def _work_of(self, pl_module: Any, batch: Batch) -> list[float]:
        tokens = len(batch.ids_T) + int(batch.lengths_B3[:, 0].sum())
        laid_out = tokens if pl_module.layout == "shared" else positions(batch.lengths_B3)
        flops = (
            0.0 if self._needed is None else self._needed.step(batch.lengths_B3, pl_module.reference.name != "cached")
        )
        return [len(batch), tokens, laid_out, flops]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the last steps of a run that ends within an interval."""
        if trainer.global_step != self._logged_step:
            self._log_training(trainer, pl_module)

    def _log_training(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = self._logged_step = trainer.global_step
        metrics = pl_module.meters["train"].read("train")
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        pairs, tokens, laid_out, flops = over_ranks(self._work, pl_module.device)
        metrics |= {
            "train/grad_norm": float(pl_module.grad_norm),
            "train/lr": pl_module.step_lr,
            "train/epoch": trainer.current_epoch,
            "perf/pairs_per_second": pairs / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/padding_fraction": 1 - tokens / laid_out,
        }
        if pl_module.skipped_steps is not None:
            metrics["train/skipped_steps"] = pl_module.skipped_steps
        if pl_module.device.type == "cuda":
            metrics["perf/device_memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
        if self._peak is not None:  # what it takes to time the peak again counts for the steps to come
            metrics["perf/mfu"] = flops / seconds / (self._peak.over(seconds) * trainer.world_size)
        self._restart(now)
        self._log(trainer, metrics, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock of the training."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the validation's means, those before the first update too."""
        metrics = pl_module.meters["val"].read("val")
        self.validations.append({"step": trainer.global_step, **metrics})
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})  # EarlyStopping
        self._log(trainer, metrics, trainer.global_step)
        self._since += time.perf_counter() - self._paused

    def is_stale(self, trainer: pl.Trainer) -> bool:
        """Return whether the weights have changed since the last validation, which another start may have made.

        Never where validation is off. Collective.
        """
        if not trainer.limit_val_batches:  # type: ignore[attr-defined]
            return False
        steps = [row["step"] for row in self.validations]
        steps = steps or from_rank_0(trainer, lambda: _validated(Path(trainer.default_root_dir)))
        return steps[-1:] != [trainer.global_step]

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        self.latest |= metrics
        points.at("log", step)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def _validated(run_dir: Path) -> list[int]:
    return [row["step"] for _, row in logged(run_dir) if "val/loss" in row]
