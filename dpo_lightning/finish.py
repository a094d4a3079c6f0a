"""What the first rank does when the training has ended: export, what was gained, sample answers, report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.cluster.exits import StorageError
from dpo_lightning.cluster.interrupt import Interrupt
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.model.source import ModelSource
from dpo_lightning.outputs import results, samples
from dpo_lightning.outputs.card import Card
from dpo_lightning.outputs.export import export
from dpo_lightning.outputs.report import write_report
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.wandb_run import WandbRun


def finish(
    config: Mapping[str, Any], source: ModelSource, data: PreferenceData, module: DPOModule, run_dir: Path,
    interrupt: Interrupt,
) -> None:  # fmt: skip
    """Export, show what was gained, answer the sample prompts, report; `config` is the resolved one.

    The export is all that the training was for: what fails of the rest is a warning. Raises StorageError where the
    disk refuses the export.
    """
    if not module.trainer.global_step:
        print("no step was made: there is nothing to export")
        return
    module.make_whole()
    module.use_layout("padded")
    merges = config["export"]["merge"]  # into the weights that answer: then the answers come before
    if merges:
        show_samples(config, data, module, run_dir, interrupt)
    try:
        folder = write_export(config, source, data, module, run_dir)
    except OSError as error:
        raise StorageError(f"{run_dir}: cannot be exported ({error}); free space and start the run again") from error
    with going_without("a table of what was gained"):
        results.show_gain(run_dir)
    if not merges:
        show_samples(config, data, module, run_dir, interrupt)
    print(f"{folder.name}: {folder}")
    with going_without("a report"):
        print(f"report:  {write_report(run_dir)}")
    print(f"metrics: {run_dir / 'metrics.jsonl'}")


@contextmanager
def going_without(what: str) -> Iterator[None]:
    """Tell of a failure in what a trained run can do without, in one line, and go on."""
    try:
        yield
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"warning: the run ends without {what}: {told}", file=sys.stderr)


def show_samples(
    config: Mapping[str, Any], data: PreferenceData, module: DPOModule, run_dir: Path, interrupt: Interrupt
) -> None:
    """Answer the sample prompts, unless a signal has come or comes meanwhile."""
    if not config["samples"]["count"]:
        return
    if not interrupt.requested:
        with suppress(KeyboardInterrupt):
            with interrupt.stoppable(), going_without("answers to prompts"):
                answer_samples(config, data, module, run_dir)
            return
    print("the answers are skipped")


def answer_samples(config: Mapping[str, Any], data: PreferenceData, module: DPOModule, run_dir: Path) -> None:
    """Answer the first prompts by reference and policy."""
    if not (examples := data.examples(config["samples"]["count"])):
        return
    module.to(module.trainer.strategy.root_device)
    device, precision = module.trainer.strategy.root_device.type, str(module.trainer.precision)
    # DeepSpeed's mixed precision rounds its own copy; this one, whole, has weights of both kinds
    with torch.autocast(device, torch.bfloat16, enabled=precision.startswith("bf16")):
        length = config["samples"]["max_new_tokens"]
        answers = samples.answer(module.policy, module.reference, data.tokenizer, examples, length)
    samples.save(answers, run_dir)
    samples.show(answers)
    for logger in module.trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.log_table("samples", answers, module.trainer.global_step)


def write_export(
    config: Mapping[str, Any], source: ModelSource, data: PreferenceData, module: DPOModule, run_dir: Path
) -> Path:
    """Export adapter or model with its card; return the folder. Raises OSError."""
    steps, validations = module.trainer.global_step, None
    with going_without("its result in the model card"):
        validations = results.validations(run_dir)
    card = Card(
        base=source.base, base_loaded_from=source.folder(), note=source.note, data=data.source.name,
        pairs=len(data.train), pairs_seen=data.seen(steps), steps=steps, devices=module.trainer.world_size,
        config=dict(config), validations=validations, question=data.examples(1)[0]["question"],
        chat=data.is_chat(),
    )  # fmt: skip
    return export(module.policy, data.tokenizer, run_dir, config["export"]["merge"], card.text)
