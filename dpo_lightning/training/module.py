"""The LightningModule: a policy, a frozen reference and a loss between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dpo_lightning.cluster import points
from dpo_lightning.model.layout import choose_layout, set_layout
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.objective.metrics import preference_metrics
from dpo_lightning.training.finite import FiniteGuard
from dpo_lightning.training.meter import PairMeans
from dpo_lightning.training.optim import reset_settings, settings_of
from dpo_lightning.training.parts import Parts
from dpo_lightning.training.position import place, restore_own, save_own
from dpo_lightning.training.spikes import Spikes
from dpo_lightning.training.start import check_start
from dpo_lightning.types import Batch, PairLogps, UserError

Loss = Callable[[PairLogps, PairLogps], Tensor]


class DPOModule(pl.LightningModule):
    """Direct Preference Optimization of a policy against a frozen reference.

    Args:
        build_policy: -> policy, called once the devices are known; its trainable parameters are trained.
        build_reference: policy -> reference with a method pair_logps(policy, batch).
        loss: (policy's PairLogps, reference's PairLogps) -> loss of each pair, shape (B,).
        beta: of the rewards that are logged; the loss carries its own.
        build_optimizer: (policy, total steps) -> optimizer and its schedule.
        seed: of the adapter's initial weights.
        layout: auto, shared or padded; see `choose_layout`.
        skip_spikes: leave out steps that are so many standard deviations above the last ones; None: none.

    `layout` is what was chosen once the model stands on its devices; `entered` when the last forward pass began, by
    time.monotonic(); `whole` the trained weights on the first rank once a sharded training has ended, None where the
    policy itself is whole.

    """

    def __init__(
        self, *, build_policy: Callable[[], nn.Module], build_reference: Callable[[nn.Module], Any],
        loss: Loss, beta: float, build_optimizer: Callable[[nn.Module, int], tuple[Any, Any]], seed: int,
        layout: str = "auto", skip_spikes: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.strict_loading = False  # checkpoints hold the trainable weights alone
        self.build_policy, self.build_reference = build_policy, build_reference
        self.loss, self.beta, self.build_optimizer, self.seed = loss, beta, build_optimizer, seed
        self.layout = layout
        self.policy: Any = None
        self.reference: Any = None
        self.ranks: list[str] | None = None  # what each rank held when the run was saved
        self.meters = {"train": PairMeans(), "val": PairMeans()}
        self.guard, self.spikes, self.parts = FiniteGuard(), Spikes(skip_spikes), Parts()
        self.grad_norm: Tensor | float | None = None
        self.skipped_steps: int | None = None  # spikes that were left out, if that was asked for
        self.step_lr, self.entered = 0.0, 0.0
        self.settled, self.checked = False, set[str]()  # stages whose first batch was checked
        self.whole: dict[str, Tensor] | None = None

    def configure_model(self) -> None:
        """Build policy and reference, once; the adapter depends on the seed alone, not on what ran before."""
        if self.policy is None:
            torch.manual_seed(self.seed)
            self.policy = self.build_policy()
            assert self.policy.training, "in eval mode dropout and activation checkpointing are silently off"
            self.reference = self.build_reference(self.policy)
            parameters = dict(self.policy.named_parameters())
            sharded = any(hasattr(p, "ds_id") for p in parameters.values())
            if sharded and any("lora_embedding" in name for name in parameters):
                raise UserError(
                    "lora.target_modules: PEFT's adapter of an embedding cannot be sharded as ZeRO 3 does; leave the "
                    "embedding out, or use strategy=zero2"
                )
            if not sharded:
                self.settle_layout()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DPOModule:
        """Take a dtype, buffers excepted, as in transformers: rounded to bfloat16, rotary frequencies turn too far."""
        exact = [(m._buffers, name, b) for m in self.modules() for name, b in m._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for buffers, name, before in exact:
            now = buffers[name]
            buffers[name] = before.to(now.device) if now is not None and now.dtype != before.dtype else now
        return self

    def settle_layout(self) -> None:
        """Choose the layout, once, by a probe of the untrained policy: of a sharded one, when it can compute."""
        if not self.settled:
            self.settled = True
            self.policy.eval()  # the probe compares two passes, which dropout would tell apart
            self.layout = choose_layout(self.policy, self.layout)
            self.policy.train()
            self.use_layout(self.layout.split()[0])

    def use_layout(self, layout: str) -> None:
        """Score policy and reference in this layout; padded is what generation and export need."""
        set_layout(self.policy, layout)
        self.reference.set_layout(layout)

    def make_whole(self) -> None:
        """Replace a sharded policy and its reference by whole ones on this rank: for the work that one rank does."""
        if self.whole is not None:
            self.policy = self.reference = None
            self.configure_model()
            self.load_state_dict(self.whole, strict=False)
            self.whole = None

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which steps with every optimizer step."""
        optimizer, schedule = self.build_optimizer(self.policy, int(self.trainer.estimated_stepping_batches))
        self.settings = settings_of(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, batch: Batch) -> tuple[PairLogps, PairLogps]:
        """Return the log-probabilities under policy and reference, in parts where a device is too small."""
        return self.parts.score(self.trainer, batch, partial(pair_logps, self.policy), self._by_reference)

    def _by_reference(self, batch: Batch) -> PairLogps:
        """Score by the reference, which a forward pass begins with."""
        points.at("forward", self.trainer.global_step)
        self.entered = time.monotonic()
        return self.reference.pair_logps(self.policy, batch)

    def _measure(self, batch: Batch, stage: str) -> Tensor:
        self.settle_layout()
        policy, reference = self(batch)
        loss_B = self.loss(policy, reference)
        if stage == "train":
            loss_B = points.spoilt(loss_B, self.trainer.global_step)
        if stage not in self.checked and self.trainer.global_step == 0:
            check_start(self, policy, reference, loss_B)  # in training again, as there may be noise that is off before
        self.checked.add(stage)
        metrics = {"loss": loss_B, **preference_metrics(policy, reference, self.beta)}
        self.meters[stage].add(metrics, batch.counted)
        return loss_B if batch.counted else loss_B * 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the step's mean over pairs.

        Lightning divides by the accumulation and DDP by the number of ranks; both are taken back, so that a step
        is the mean over its own pairs however they were dealt out.
        """
        trainer = self.trainer
        self.guard.begin(batch)
        points.at("step.begin", trainer.global_step)
        share = trainer.accumulate_grad_batches * trainer.world_size / batch.step_pairs
        loss_B = self._measure(batch, "train")
        self.guard.add(loss_B)
        return loss_B.sum() * share

    def on_before_backward(self, loss: Tensor) -> None:
        """Be known to be in the backward pass."""
        points.at("backward.begin", self.trainer.global_step)

    def on_after_backward(self) -> None:
        """Be known to have come through it."""
        points.at("backward.end", self.trainer.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does; forward and backward pass are part of it."""
        super().optimizer_step(*args, **kwargs)
        points.at("update.end", self.trainer.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Be known to wait for the next batch; what callbacks do at a step's end is done."""
        points.at("data.next", self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Be known to have gradients; the weights are those of the step before."""
        points.at("update.begin", self.trainer.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the batch; the means are read at the end of the validation."""
        points.at("val.mid", self.trainer.global_step)
        self._measure(batch, "val")

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all trainable gradients; refuse what is not finite, leave out spikes.

        DeepSpeed clips by itself; see training/zero.py. With float16 a gradient that overflows is a matter of the
        loss' scale: the scaler leaves the step out.
        """
        self.step_lr = optimizer.param_groups[0]["lr"]
        if not self.trainer.strategy.handles_gradient_accumulation:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.grad_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))
            scaled = str(self.trainer.precision) == "16-mixed"
            loss = self.guard.check(self.trainer, None if scaled else self.grad_norm)
            self.guard.clear()
            if self.leaves_out(loss, self.grad_norm):
                for p in parameters:
                    p.grad = None  # AdamW passes over what has no gradient: weight and moments stay

    def leaves_out(self, loss: float, norm: Tensor | float) -> bool:
        """Return whether the step of this mean loss and gradient norm is a spike, which is told and counted."""
        if not self.spikes.is_spike(loss, norm):
            return False
        self.skipped_steps = self.spikes.skipped
        self.print(f"step {self.trainer.global_step + 1} is left out: loss {loss:.4g}, gradient norm "
                   f"{float(norm):.4g} are far above those before")  # fmt: skip
        return True

    def on_train_end(self) -> None:
        """Let go of gradients and moments, now saved: the strategy would carry them to the host's memory at its end."""
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what does not train: it comes back from the base model; put in what each rank holds of its own."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trainable}
        checkpoint["spikes"], checkpoint["parts"] = self.spikes.state(), self.parts.count
        checkpoint["ranks"] = save_own(self.meters["train"], self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the same pair, whatever the number of ranks; the ranks' own state waits for the training's start."""
        data = checkpoint[type(self.trainer.datamodule).__qualname__]  # type: ignore[attr-defined]
        place(checkpoint, data, self.trainer.accumulate_grad_batches)
        self.ranks = checkpoint["ranks"]
        self.spikes.load(checkpoint["spikes"])
        self.parts.count = checkpoint.get("parts", 1)  # those of before 2026-11-23 do not say

    def on_train_start(self) -> None:
        """Go on with the random numbers and the means of the run that is resumed, and with this start's settings."""
        if self.ranks is not None:
            restore_own(self.ranks, self.meters["train"], self.global_rank, self.device)
            schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
            reset_settings(self.trainer.optimizers[0], schedule, self.settings)
            self.ranks = None
