"""Build and fit, then `finish.py`'s export: the only file that turns a configuration into objects."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from dpo_lightning.cache import cache_dir
from dpo_lightning.checkpoints import lock
from dpo_lightning.checkpoints.base import Base
from dpo_lightning.checkpoints.changes import changed
from dpo_lightning.checkpoints.folder import CONFIG, run_id, step_of
from dpo_lightning.checkpoints.resume import ORIGIN, id_of, undo_later
from dpo_lightning.checkpoints.saver import Checkpoints, Saver, mend
from dpo_lightning.checkpoints.starts import note
from dpo_lightning.checkpoints.writer import sweep as remove_leftovers
from dpo_lightning.cluster import slurm
from dpo_lightning.cluster.agreement import Agreement, decided_by_rank_0, flat
from dpo_lightning.cluster.exits import STORAGE, RankLost, StorageError, TooLarge
from dpo_lightning.cluster.interrupt import Interrupt
from dpo_lightning.cluster.watchdog import TALK, Watchdog
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.data.prepare import left_out
from dpo_lightning.finish import finish
from dpo_lightning.model.source import ModelSource
from dpo_lightning.resolve import check_resume, fingerprint, passes, plain, resolve, step_pairs
from dpo_lightning.training import loggers
from dpo_lightning.training.devices import on_cuda
from dpo_lightning.training.failures import Failures
from dpo_lightning.training.memory import keep_freed_memory
from dpo_lightning.training.metric_log import MetricLog
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.precision import frozen_dtype, store_linears
from dpo_lightning.training.progress import ProgressBar
from dpo_lightning.training.reference_cache import ReferenceCache
from dpo_lightning.training.summary import Summary, print_facts
from dpo_lightning.training.time_limit import TimeLimit
from dpo_lightning.types import UserError

SMALLER = (
    "half of data.batch_size with twice trainer.accumulate_grad_batches makes the same steps, and may be given to a "
    "run that is resumed; model.gradient_checkpointing=true saves more"
)

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
disable_progress_bar()  # of loading weights; the training has one of its own
datasets.disable_progress_bars()
# Where bits have to repeat PyTorch would also fill every new tensor, for programs that read before they write.
torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train(cfg: DictConfig, run_dir: Path, resume: Path | None, sweep: bool) -> int:
    """Train what a checked configuration describes, from a checkpoint's state if there is one; return the exit code.

    sweep: other trials will use the same reference, which reference=auto then caches.
    """
    run_dir, resume = decided_by_rank_0(run_dir, resume)
    pl.seed_everything(cfg.seed, verbose=False)
    source: ModelSource = instantiate(cfg.model, _convert_="all", cache=cache_dir() / "models")
    data = build_data(cfg, source)
    strategy = resolve(cfg, source, data, sweep)
    check_resume(cfg, data, resume)
    source.folder()  # makes random weights while nothing shards or places what is made
    facts_of_run = {"data": fingerprint(data), "step_pairs": step_pairs(cfg), "passes": passes(cfg)}
    saver = Saver(plain(cfg), facts_of_run, cfg.checkpoint.keep_last)
    interrupt, log = Interrupt(slurm.end_of_job, lambda: saver.seconds), MetricLog()
    watchdog = Watchdog(cfg.cluster.hang_seconds, cfg.cluster.slow_factor, saver.wait)

    def begin(trainer: pl.Trainer) -> None:
        saver.facts["run"] = begin_run(cfg, run_dir, trainer, resume)

    own = {"run folder (run_dir= sets it)": str(run_dir), "checkpoint": str(resume), "data": fingerprint(data)}
    plan = {**flat(plain(cfg)), **own}
    base = Base(source.weights_digest, saver.facts, resume, bool({"model", "model.name"} & {*cfg.resume_allow}))
    trainer = build_trainer(cfg, run_dir, saver, [
        Agreement(plan, begin), base, Summary(facts(cfg, source, data, run_dir, resume, strategy)), watchdog,
        Failures(run_dir), log, interrupt,
    ], Checkpoints(run_dir, cfg.checkpoint.every_n_steps, interrupt.words))  # fmt: skip
    cache = ReferenceCache(cache_dir() / "reference", source.digest, interrupt)
    if cfg.reference.mode == "cached":
        trainer.callbacks.append(cache)  # type: ignore[attr-defined]
    module = build_module(cfg, source, data.layout)
    with interrupt.installed():
        with loggers.closed(trainer):
            trained = fit(trainer, module, data, resume, interrupt, log, watchdog)
            interrupt.complete = interrupt.complete or (trained and not interrupt.stopping)
            if trained and trainer.is_global_zero and not interrupt.goes_on:
                finish(plain(cfg), source, data, module, run_dir, interrupt)
            if trained:  # launchers kill the first rank in its export when another has gone with an exit code
                interrupt.words.wait()
        return close(run_dir, trainer, interrupt, saver, 0 if cache.cannot_keep else cache.computed)


def close(run_dir: Path, trainer: pl.Trainer, interrupt: Interrupt, saver: Saver, pairs_cached: int) -> int:
    """Note how a run has ended, and have a job that goes on started again; return the exit code. Collective.

    Raises StorageError where a run was stopped and what it had trained could not be saved.
    """
    lost = interrupt.stopping and not interrupt.complete and interrupt.words.highest(saver.refused) > 0
    if trainer.is_global_zero:
        code = STORAGE if lost else interrupt.exit_code
        note(run_dir, end=code, step=trainer.global_step, pairs_cached=pairs_cached)
        if interrupt.goes_on and not lost:
            slurm.requeue()
    if lost:
        then = mend(run_dir / "checkpoints")
        raise StorageError(f"{run_dir}: what was trained since its last checkpoint could not be saved; {then}")
    return interrupt.exit_code


def fit(
    trainer: pl.Trainer, module: DPOModule, data: PreferenceData, resume: Path | None, interrupt: Interrupt,
    log: MetricLog, watchdog: Watchdog,
) -> bool:  # fmt: skip
    """Train, and validate what was trained; return whether it came to a step's end.

    Raises RankLost where the ranks' talk has failed since one of them is gone.
    """
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if resume is not None:
        trainer.num_sanity_val_steps = 0  # the validation before the first update has been made
    watchdog.take_over(trainer)
    given = os.environ.get("MASTER_PORT")  # else a launcher finds a free one
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        if not interrupt.stopping and log.is_stale(trainer):
            trainer.validate(module, data, verbose=False)
    except SystemExit:  # what Lightning makes of a KeyboardInterrupt
        if not interrupt.requested:
            raise
        return False
    except torch.OutOfMemoryError as error:
        raise TooLarge(f"out of memory: {str(error).splitlines()[0]}; {SMALLER}") from error
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            then = "give a free one, or unset it" if given else "start again"
            raise UserError(f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken; {then}") from error
        if TALK.search(str(error)) and (lost := watchdog.lost()):
            raise RankLost(f"{lost}; the run goes on from its last checkpoint when it is started again") from error
        raise
    finally:
        watchdog.end()
    return True


def begin_run(cfg: DictConfig, run_dir: Path, trainer: pl.Trainer, resume: Path | None) -> str:
    """Open the run before its model is built; raise UserError where its folder cannot be written."""
    try:
        return open_run(cfg, run_dir, trainer, resume)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error}); free space or choose another") from error


def open_run(cfg: DictConfig, run_dir: Path, trainer: pl.Trainer, resume: Path | None) -> str:
    """Make the run folder with the resolved configuration, and start the loggers; return the run's id."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if lock.take(run_dir) and run_id(run_dir) is not None:  # what was decided on an absent folder
        raise lock.Taken(f"run_dir={run_dir}: another process has trained there meanwhile; start again")
    known = id_of(run_dir, resume)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    remove_leftovers(run_dir / "checkpoints")
    step = step_of(resume) if resume is not None else -1
    if resume is not None and resume.parent.parent.parent != run_dir:
        (run_dir / ORIGIN).write_text(str(resume.parent))
    undo_later(run_dir, step)
    jsonl = loggers.JsonlLogger(run_dir)
    jsonl.rewind(step)
    # by this row a line is known that is started again: only then has it gone back
    note(run_dir, start=max(step, 0), ranks=trainer.world_size, changed=changed_settings(cfg, resume))
    trainer.loggers = [jsonl, *instantiate(cfg.logger)(run_dir, plain(cfg))]
    return known


def changed_settings(cfg: DictConfig, resume: Path | None) -> Mapping[str, Any]:
    """Return the settings that this start changes, each with its old and new value: a rollback with others, too."""
    return changed(json.loads((resume.parent / CONFIG).read_text()), plain(cfg)) if resume is not None else {}


def build_data(cfg: DictConfig, source: ModelSource) -> PreferenceData:
    """Return the data, every row read and judged: before this, no model is loaded."""
    data: PreferenceData = instantiate(cfg.data)(load_tokenizer=source.load_tokenizer, seed=cfg.seed)
    data.prepare_data()
    source.check_fits(data.longest(), data.largest_id())
    return data


def only_check(cfg: DictConfig, run_dir: Path, resume: Path | None, sweep: bool) -> int:
    """Read configuration, tokenizer and rows, and say what a training would run on; load no model."""
    source: ModelSource = instantiate(cfg.model, _convert_="all", cache=cache_dir() / "models")
    data = build_data(cfg, source)
    strategy = resolve(cfg, source, data, sweep)
    check_resume(cfg, data, resume)
    print_facts("DPO", facts(cfg, source, data, run_dir, resume, strategy))
    return 0


def build_trainer(
    cfg: DictConfig, run_dir: Path, saver: Saver, callbacks: list[pl.Callback], checkpoints: Checkpoints
) -> pl.Trainer:
    """Return Lightning's Trainer; what it refuses becomes a UserError.

    `checkpoints` come last: they hold what the configured callbacks have made of a step.
    """
    chosen = list(instantiate(cfg.callbacks).values())
    build = partial(instantiate(cfg.strategy), cuda=on_cuda(cfg.trainer.accelerator), precision=cfg.trainer.precision)
    plugins: list[Any] = [saver]
    if SLURMEnvironment.detect():  # by itself it would save within a signal's handler, anywhere in a step
        plugins.append(SLURMEnvironment(auto_requeue=False))
    limit = plain(cfg.trainer).get("max_time")
    try:
        chosen += [TimeLimit(limit)] if limit else []  # where there is a timer Lightning makes none
        return instantiate(
            cfg.trainer, _convert_="all", strategy=build(pairs=cfg.data.batch_size),
            plugins=plugins, logger=False, callbacks=[*callbacks, *chosen, checkpoints], default_root_dir=run_dir,
            enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=any(isinstance(c, ProgressBar) for c in chosen),
            use_distributed_sampler=False,
        )  # fmt: skip
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, MisconfigurationException | TypeError | ValueError):
            raise UserError(f"trainer: {str(cause).splitlines()[0]}") from error
        raise


def build_module(cfg: DictConfig, source: ModelSource, layout: str) -> DPOModule:
    """Return the module; its models are built when the trainer calls for them."""
    precision = cfg.trainer.precision
    full = "r" not in cfg.lora
    # A trained weight is kept in float32 and rounded on use; a frozen one is stored as it is used.
    dtype = frozen_dtype(precision if not full or precision == "bf16-true" else "32-true")
    add_lora = instantiate(cfg.lora)

    def frozen_model() -> Any:
        model = source.load(dtype)
        return store_linears(model, frozen_dtype(precision)) if full else model

    return DPOModule(
        build_policy=lambda: add_lora(source.load(dtype)),
        build_reference=partial(instantiate(cfg.reference), load=frozen_model),
        loss=instantiate(cfg.loss), beta=cfg.loss.beta, build_optimizer=instantiate(cfg.optim), seed=cfg.seed,
        layout=layout, skip_spikes=cfg.skip_spikes,
    )  # fmt: skip


def facts(
    cfg: DictConfig, source: ModelSource, data: PreferenceData, run_dir: Path, resume: Path | None, strategy: str
) -> Mapping[str, str]:  # fmt: skip
    """Return what the summary tells before the model is built."""
    assert data.census is not None
    skipped = left_out(data.census)
    if seen := data.shared_prompts():
        skipped += f"; {seen} validation pairs have a prompt that is trained on"
    text = "chat template" if data.is_chat() else "plain text"
    lora = f"LoRA r {cfg.lora.r} on {cfg.lora.target_modules}" if "r" in cfg.lora else "full fine-tuning"
    effective = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    validation = {}
    if data.val_source is not None and data.val_census is not None:
        validation["validation"] = f"{data.val_source.name}: {len(data.val)} pairs{left_out(data.val_census)}"
        validation["its lengths"] = data.told_lengths(data.val, data.val_census)
    return {
        "model": f"{source.base}, {lora}" + (", untrained random weights" if source.init == "random" else ""),
        "data": f"{data.source.name}: {len(data.train)} training pairs, {len(data.val)} held out, {text}{skipped}",
        "lengths": data.told_lengths(data.train, data.census),
        **validation,
        "loss": f"{cfg.loss._target_.rsplit('.', 1)[-1]}, {options_of(cfg.loss)}",
        "optimizer": f"AdamW, lr {cfg.optim.lr:g}, {cfg.optim.schedule}; {effective} pairs a step and device",
        "strategy": strategy,
        "run folder": str(run_dir) + (f", resumed from step {step_of(resume)}" if resume is not None else ""),
    }  # fmt: skip


def options_of(group: DictConfig) -> str:
    """Return a group's keys and values as text."""
    return ", ".join(f"{key} {value}" for key, value in group.items() if not str(key).startswith("_"))
