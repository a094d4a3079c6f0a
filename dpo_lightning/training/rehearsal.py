"""The largest batch goes through the model once before the first step: what does not fit is known within a minute.

It also settles where memory lies: a heap that meets ever larger batches grows with each, around what the smaller ones
have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dpo_lightning.training.parts import random_states, restore_random


class Rehearsal(pl.Callback):
    """Runs forward and backward pass of the largest batch ahead, and lets go of its gradients.

    It takes no more memory than a step: of the gradients one at a time. Weights, moments, means and random numbers stay
    what they were. Not under ZeRO-3, whose passes are DeepSpeed's own.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Rehearse. Collective: each rank has its own largest batch. Raises what a step would raise."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(trainer.strategy, "zero_stage_3", False) or (batch := data.largest_ahead()) is None:
            return
        random = random_states()
        pl_module.guard.begin(batch)  # should it fail, its pairs are named
        with trainer.precision_plugin.train_step_context():
            loss = pl_module.loss(*pl_module(trainer.strategy.batch_to_device(batch))).sum()
        _backward(loss, [p for p in pl_module.policy.parameters() if p.requires_grad])
        pl_module.guard.clear()
        restore_random(random)


def _backward(loss: Tensor, trained: Sequence[Tensor]) -> None:
    """Go through the backward pass and let go of each weight's gradient at once, since DDP and ZeRO keep theirs apart.

    The gradients are those of the leaves: no hook of DDP or DeepSpeed runs, and no `grad` is written.
    """
    nothing = loss.new_zeros(())
    hooks = [p.register_hook(lambda gradient: nothing.to(gradient).expand_as(gradient)) for p in trained]
    try:
        torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
