"""Build, fit, export: the only file that turns a configuration into objects."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.data.prepare import cache_dir, most_common
from dpo_lightning.model.source import ModelSource
from dpo_lightning.outputs import results, samples
from dpo_lightning.outputs.card import Card
from dpo_lightning.outputs.export import export
from dpo_lightning.outputs.report import write_report
from dpo_lightning.training import loggers
from dpo_lightning.training.checkpoint import Checkpoints
from dpo_lightning.training.interrupt import Interrupt, stoppable
from dpo_lightning.training.metric_log import MetricLog
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optim import resolve_lr
from dpo_lightning.training.precision import frozen_dtype, resolve_precision, store_linears
from dpo_lightning.training.progress import ProgressBar
from dpo_lightning.training.reference_cache import ReferenceCache
from dpo_lightning.training.resume import step_of
from dpo_lightning.training.summary import Summary, print_facts
from dpo_lightning.types import UserError

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
disable_progress_bar()  # of loading weights; the training has one of its own
datasets.disable_progress_bars()


def train(cfg: DictConfig, run_dir: Path, resume: Path | None, sweep: bool) -> int:
    """Train what a checked configuration describes, from a checkpoint's state if there is one; return the exit code.

    In a sweep other trials will need the same reference.
    """
    pl.seed_everything(cfg.seed, verbose=False)
    source: ModelSource = instantiate(cfg.model, _convert_="all", cache=cache_dir() / "models")
    data = build_data(cfg, source)
    resolve(cfg)
    interrupt, log = Interrupt(), MetricLog()
    trainer = build_trainer(cfg, run_dir, [
        Summary(facts(cfg, source, data, run_dir, resume)), log, interrupt,
        Checkpoints(run_dir, cfg.checkpoint.every_n_steps, interrupt),
    ])  # fmt: skip
    if cfg.reference.mode == "auto":
        cfg.reference.mode = reference_mode(cfg, len(data.train), trainer.world_size, sweep)
    if cfg.reference.mode == "cached":
        cache = ReferenceCache(cache_dir() / "reference", source.weights_digest, interrupt)
        trainer.callbacks.append(cache)  # type: ignore[attr-defined]
    module = build_module(cfg, source, data.layout)
    open_run(cfg, run_dir, trainer, resume)
    with interrupt.installed(), finished_loggers():
        try:
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        except SystemExit:  # what Lightning makes of a KeyboardInterrupt
            if not interrupt.requested:
                raise
            return interrupt.exit_code
        if not interrupt.requested and log.is_stale(trainer):
            trainer.validate(module, data, verbose=False)
    if trainer.is_global_zero:
        if trainer.global_step:
            finish(cfg, source, data, module, run_dir, interrupt.requested)
        else:
            print("no step was made: there is nothing to export")
    return interrupt.exit_code


def resolve(cfg: DictConfig) -> None:
    """Replace every `auto` of the configuration that does not need the model by what it stands for."""
    full = "r" not in cfg.lora
    cfg.trainer.precision = resolve_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    cfg.optim.lr = resolve_lr(cfg.optim.lr, full)


def reference_mode(cfg: DictConfig, pairs: int, devices: int, sweep: bool) -> str:
    """Return what reference=auto becomes: cached where a pair is met more than once."""
    steps, epochs = cfg.trainer.max_steps, cfg.trainer.max_epochs
    step = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices
    ends_within_an_epoch = epochs == 1 or (steps != -1 and steps * step <= pairs)
    if sweep or not ends_within_an_epoch:
        return "cached"
    return "adapter_off" if "r" in cfg.lora else "frozen_copy"


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain values."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def open_run(cfg: DictConfig, run_dir: Path, trainer: pl.Trainer, resume: Path | None) -> None:
    """Make the run folder with the resolved configuration, and start the loggers."""
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    jsonl = loggers.JsonlLogger(run_dir)
    jsonl.rewind(step_of(resume) if resume is not None else -1)
    trainer.loggers = [jsonl, *instantiate(cfg.logger)(run_dir, plain(cfg))]


def build_data(cfg: DictConfig, source: ModelSource) -> PreferenceData:
    """Return the data, every row read and judged: before this, no model is loaded."""
    data: PreferenceData = instantiate(cfg.data)(load_tokenizer=source.load_tokenizer, seed=cfg.seed)
    data.prepare_data()
    batches, interval = -(-len(data.train) // cfg.data.batch_size), cfg.trainer.val_check_interval
    if isinstance(interval, int) and interval > batches:
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has {batches} batches; give at most that")
    source.check_fits(max(longest_of(data.lengths(table)) for table in (data.train, data.val)), data.tokenizer)
    return data


def only_check(cfg: DictConfig, run_dir: Path, resume: Path | None) -> int:
    """Read configuration, tokenizer and rows, and say what a training would run on; load no model."""
    source: ModelSource = instantiate(cfg.model, _convert_="all", cache=cache_dir() / "models")
    data = build_data(cfg, source)
    resolve(cfg)
    print_facts("DPO", facts(cfg, source, data, run_dir, resume))
    return 0


def build_trainer(cfg: DictConfig, run_dir: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return Lightning's Trainer; what it refuses becomes a UserError."""
    chosen = list(instantiate(cfg.callbacks).values())
    try:
        return instantiate(
            cfg.trainer, _convert_="all", strategy=instantiate(cfg.strategy)(), logger=False,
            callbacks=[*callbacks, *chosen], default_root_dir=run_dir, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=any(isinstance(c, ProgressBar) for c in chosen),
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
        layout=layout,
    )  # fmt: skip


def facts(
    cfg: DictConfig, source: ModelSource, data: PreferenceData, run_dir: Path, resume: Path | None
) -> Mapping[str, str]:  # fmt: skip
    """Return what the summary tells before the model is built."""
    lengths = data.lengths(data.train)
    mean, census = lengths.mean(0), data.census
    assert census is not None
    left_out = sum(census.skipped.values())
    skipped = f"; {left_out} of {census.rows} rows left out: {most_common(census)}" if left_out else ""
    if seen := data.shared_prompts():
        skipped += f"; {seen} validation pairs have a prompt that is trained on"
    text = "chat template" if data.is_chat() else "plain text"
    lora = f"LoRA r {cfg.lora.r} on {cfg.lora.target_modules}" if "r" in cfg.lora else "full fine-tuning"
    effective = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    return {
        "model": f"{source.base}, {lora}" + (", untrained random weights" if source.init == "random" else ""),
        "data": f"{data.source.name}: {len(data.train)} training pairs, {len(data.val)} held out, {text}{skipped}",
        "lengths": f"prompt {mean[0]:.0f}, chosen {mean[1]:.0f}, rejected {mean[2]:.0f} tokens on average; longest "
        f"sequence {longest_of(lengths)}, {census.truncated} pairs cut to data.max_length={cfg.data.max_length}",
        "loss": f"{cfg.loss._target_.rsplit('.', 1)[-1]}, {options_of(cfg.loss)}",
        "optimizer": f"AdamW, lr {cfg.optim.lr:g}, {cfg.optim.schedule}; {effective} pairs a step and device",
        "run folder": str(run_dir) + (f", resumed from step {step_of(resume)}" if resume is not None else ""),
    }  # fmt: skip


def options_of(group: DictConfig) -> str:
    """Return a group's keys and values as text."""
    return ", ".join(f"{key} {value}" for key, value in group.items() if not str(key).startswith("_"))


def longest_of(lengths: Any) -> int:
    """Return the tokens of the longest prompt with a completion, given lengths of shape (pairs, 3)."""
    return int((lengths[:, :1] + lengths[:, 1:]).max())


def finish(
    cfg: DictConfig, source: ModelSource, data: PreferenceData, module: DPOModule, run_dir: Path, interrupted: bool
) -> None:
    """Show what was gained, answer the sample prompts, export, report: rank 0's last work."""
    module.use_layout("padded")
    results.show_gain(run_dir)
    try:
        if not interrupted:
            show_samples(cfg, data, module, run_dir)
    except KeyboardInterrupt:
        print("the answers are skipped")
    finally:  # whatever happens to the answers, the training is not lost
        write_export(cfg, source, data, module, run_dir)


def show_samples(cfg: DictConfig, data: PreferenceData, module: DPOModule, run_dir: Path) -> None:
    """Answer the first validation prompts by reference and policy."""
    if not (examples := data.examples(cfg.samples.count)):
        return
    module.to(module.trainer.strategy.root_device)
    with stoppable(), module.trainer.precision_plugin.forward_context():
        answers = samples.answer(module.policy, module.reference, data.tokenizer, examples, cfg.samples.max_new_tokens)
    samples.save(answers, run_dir)
    samples.show(answers)


def write_export(cfg: DictConfig, source: ModelSource, data: PreferenceData, module: DPOModule, run_dir: Path) -> None:
    """Export adapter or model with its card, write the report, say where all lies."""
    card = Card(
        base=source.base, base_loaded_from=source.folder(), note=source.note, data=data.source.name,
        pairs=len(data.train), steps=module.trainer.global_step, devices=module.trainer.world_size, config=plain(cfg),
        validations=results.validations(run_dir), question=data.examples(1)[0]["question"], chat=data.is_chat(),
    )  # fmt: skip
    folder = export(module.policy, data.tokenizer, run_dir, cfg.export.merge, card.text)
    print(f"{folder.name}: {folder}\nreport:  {write_report(run_dir)}\nmetrics: {run_dir / 'metrics.jsonl'}")


@contextmanager
def finished_loggers() -> Any:
    """Close W&B's run whatever happens, or the next run of the process would go on in it."""
    try:
        yield
    finally:
        loggers.finish()
