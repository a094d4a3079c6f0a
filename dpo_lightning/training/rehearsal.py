"""The largest batch goes through the model once before the first step: what does not fit is known within a minute.

It also settles where memory lies. A heap that meets ever larger batches grows with each, around what the smaller ones
have left; the largest first leaves room for all others (HH on a CPU: 3.6 instead of 5.1 GB after 20 steps).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from dpo_lightning.training.parts import random_states, restore_random


class Rehearsal(pl.Callback):
    """Runs forward and backward pass of the largest batch ahead, and lets go of its gradients.

    Weights, moments, means and random numbers stay what they were. Not under ZeRO-3, whose passes are DeepSpeed's own.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Rehearse. Collective: each rank has its own largest batch. Raises what a step would raise."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(trainer.strategy, "zero_stage_3", False) or (batch := data.largest_ahead()) is None:
            return
        random = random_states()
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.loss(*pl_module(trainer.strategy.batch_to_device(batch))).sum()
        # Of the leaves themselves: no hook of DDP or DeepSpeed runs, and no `grad` is written.
        torch.autograd.grad(loss, [p for p in pl_module.policy.parameters() if p.requires_grad], allow_unused=True)
        restore_random(random)
