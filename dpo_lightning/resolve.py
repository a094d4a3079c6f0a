"""What every `auto` stands for, and what data, devices and checkpoint do not allow: told before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpo_lightning.checkpoints.changes import compare_config
from dpo_lightning.checkpoints.folder import CONFIG, MANIFEST
from dpo_lightning.data.batches import limited
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.model.source import ModelSource
from dpo_lightning.training.devices import (
    choose_strategy,
    count_devices,
    memory_of_device,
    resolve_accelerator,
    resolve_deterministic,
    state_bytes,
)
from dpo_lightning.training.optim import resolve_lr
from dpo_lightning.training.precision import resolve_precision
from dpo_lightning.types import UserError


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain values."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def resolve(cfg: DictConfig, source: ModelSource, data: PreferenceData, sweep: bool) -> str:
    """Replace every `auto` of the configuration by what it stands for; return the strategy and the reason for it."""
    full = "r" not in cfg.lora
    trainer = cfg.trainer
    settle_trainer(trainer, len(data.val))
    cfg.optim.lr = resolve_lr(cfg.optim.lr, full)
    devices = count_devices(trainer.accelerator, plain(trainer)["devices"], trainer.num_nodes)
    check_limits(cfg, len(data.train), len(data.val), devices)
    by_batch = source.turns_by_batch(data.longest())
    if cfg.reference.mode == "auto":
        cfg.reference.mode = reference_mode(cfg, len(data.train), devices, sweep, by_batch)
    elif cfg.reference.mode == "cached" and by_batch:
        raise UserError(
            "reference=cached: in sequences as long as these, this model's positions depend on the batch, so that a "
            "pair has no log-probabilities of its own; use reference=auto, or a smaller data.max_length"
        )

    def needed(strategy: str) -> int:
        weights = source.count_weights()
        copies = 1 + (cfg.reference.mode == "frozen_copy" and not cfg.reference.offload)
        return state_bytes(strategy, trainer.precision, weights, weights if full else 0, copies, devices)

    if sweep and devices > 1 and "WANDB_SWEEP_ID" not in os.environ:
        raise UserError("--multirun: not with several devices, as each rank would run the whole sweep; use a W&B sweep")

    have = memory_of_device(trainer.accelerator, devices // trainer.num_nodes)
    cfg.strategy.name, reason = choose_strategy(cfg.strategy.name, devices, have, needed)
    if cfg.strategy.name == "single" and devices > 1:
        raise UserError(f"strategy=single: there are {devices} devices; choose another, or trainer.devices=1")
    if cfg.reference.offload and cfg.strategy.name.startswith("zero3"):
        raise UserError(
            f"reference.offload: not with strategy={cfg.strategy.name}, which shards the reference; leave it out, "
            "or use strategy=zero3_offload, which keeps all weights in the host's memory"
        )
    if cfg.skip_spikes is not None and trainer.precision == "16-mixed":
        raise UserError("skip_spikes: not with trainer.precision=16-mixed; use bf16-mixed, or leave it out")
    return f"{cfg.strategy.name} ({reason})" if reason else cfg.strategy.name


def settle_trainer(trainer: DictConfig, held_out: int) -> None:
    """Replace what the trainer's keys leave to the machine and to the number of held-out pairs."""
    trainer.accelerator = resolve_accelerator(trainer.accelerator)
    trainer.precision = resolve_precision(trainer.precision, trainer.accelerator)
    trainer.deterministic = resolve_deterministic(trainer.deterministic, trainer.accelerator)
    if not held_out:
        trainer.limit_val_batches = 0


def check_limits(cfg: DictConfig, pairs: int, held_out: int, devices: int) -> None:
    """Raise UserError for an interval of batches that does not fit an epoch, or that would cut a step in two."""
    accumulate, limit, interval = (
        cfg.trainer[key] for key in ("accumulate_grad_batches", "limit_train_batches", "val_check_interval")
    )
    batches = -(-pairs // (cfg.data.batch_size * accumulate * devices)) * accumulate
    used = limited(batches, limit)
    if isinstance(interval, int) and interval > used:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has {used} batches; give at most that")
    for key, among in (
        ("limit_train_batches", batches),
        ("limit_val_batches", -(-held_out // (cfg.data.batch_size * devices))),
    ):
        if cfg.trainer[key] and limited(among, cfg.trainer[key]) < 1:
            more = "more" if key == "limit_train_batches" else "more, or 0"
            raise UserError(f"trainer.{key}={cfg.trainer[key]}: less than one of {among} batches; give {more}")
    if used % accumulate:
        raise UserError(
            f"trainer.limit_train_batches={limit}: {used} batches are no whole number of steps of "
            f"trainer.accumulate_grad_batches={accumulate}; give a multiple of it"
        )


def check_resume(cfg: DictConfig, data: PreferenceData, resume: Path | None) -> None:
    """Raise UserError where the run that is resumed was another one: other data, another loss, another step."""
    if resume is None:
        return
    try:
        compare_config(json.loads((resume.parent / CONFIG).read_text()), plain(cfg), cfg.resume_allow)
    except UserError as error:
        raise UserError(f"{error}\nthe checkpoint is {resume.parent}; another run_dir begins another run") from None
    manifest = json.loads((resume.parent / MANIFEST).read_text())
    if manifest.get("data") != fingerprint(data) and "data" not in cfg.resume_allow:
        allow = ",".join([*cfg.resume_allow, "data"])
        raise UserError(
            f"resume: {resume.parent} was trained on other pairs than {data.source.name} gives now; "
            f"give the old ones, or resume_allow=[{allow}] to go on with these on purpose"
        )
    now = step_pairs(cfg)
    if manifest.get("step_pairs") != now:
        raise UserError(
            f"data.batch_size: a step would have {now} pairs, in the checkpoint it has {manifest.get('step_pairs')}; "
            "batch_size x accumulate_grad_batches x devices has to stay"
        )
    limit = cfg.trainer.limit_train_batches
    if isinstance(limit, int) and manifest.get("passes") != passes(cfg):
        raise UserError(f"trainer.limit_train_batches={limit}: counts the batches of a rank; on other devices, or with "
                        "another accumulation, the epoch would have other steps than the checkpoint's")  # fmt: skip


def passes(cfg: DictConfig) -> int:
    """Return the forward passes that an optimizer step's pairs are dealt to, those of all ranks."""
    devices = count_devices(cfg.trainer.accelerator, plain(cfg.trainer)["devices"], cfg.trainer.num_nodes)
    return cfg.trainer.accumulate_grad_batches * devices


def step_pairs(cfg: DictConfig) -> int:
    """Return the pairs of an optimizer step."""
    return cfg.data.batch_size * passes(cfg)


def fingerprint(data: PreferenceData) -> str:
    """Return a text that changes with any token of any training pair, and with their order."""
    return hashlib.sha256(data.keys(data.train).tobytes()).hexdigest()


def reference_mode(cfg: DictConfig, pairs: int, devices: int, sweep: bool, by_batch: bool = False) -> str:
    """Return what reference=auto becomes: cached where a pair is met more than once, and scored alike each time.

    by_batch: its log-probabilities depend on the pairs beside it.
    """
    steps, epochs = cfg.trainer.max_steps, cfg.trainer.max_epochs
    accumulate = cfg.trainer.accumulate_grad_batches
    whole = pairs // (cfg.data.batch_size * accumulate * devices)  # steps of an epoch
    within = limited(whole * accumulate, cfg.trainer.limit_train_batches) // accumulate
    ends_within_an_epoch = epochs == 1 or (steps != -1 and steps <= within)
    if not by_batch and (sweep or not ends_within_an_epoch):
        return "cached"
    return "adapter_off" if "r" in cfg.lora else "frozen_copy"
