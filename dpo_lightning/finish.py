"""What the first rank does when the training has ended: what was gained, sample answers, export, report."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Show what was gained, answer the sample prompts, export, report; `config` is the resolved one."""
    if not module.trainer.global_step:
        print("no step was made: there is nothing to export")
        return
    module.make_whole()
    module.use_layout("padded")
    results.show_gain(run_dir)
    try:
        if not interrupt.stopping:
            with interrupt.stoppable():
                show_samples(config, data, module, run_dir)
    except KeyboardInterrupt:
        print("the answers are skipped")
    finally:  # whatever happens to the answers, the training is not lost
        try:
            write_export(config, source, data, module, run_dir)
        except OSError as error:
            raise StorageError(
                f"{run_dir}: cannot be exported ({error}); free space and start the run again"
            ) from error


def show_samples(config: Mapping[str, Any], data: PreferenceData, module: DPOModule, run_dir: Path) -> None:
    """Answer the first validation prompts by reference and policy."""
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
) -> None:
    """Export adapter or model with its card, write the report, say where all lies."""
    steps = module.trainer.global_step
    card = Card(
        base=source.base, base_loaded_from=source.folder(), note=source.note, data=data.source.name,
        pairs=len(data.train), pairs_seen=data.seen(steps), steps=steps, devices=module.trainer.world_size,
        config=dict(config), validations=results.validations(run_dir), question=data.examples(1)[0]["question"],
        chat=data.is_chat(),
    )  # fmt: skip
    folder = export(module.policy, data.tokenizer, run_dir, config["export"]["merge"], card.text)
    print(f"{folder.name}: {folder}\nreport:  {write_report(run_dir)}\nmetrics: {run_dir / 'metrics.jsonl'}")
