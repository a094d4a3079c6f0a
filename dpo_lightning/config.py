"""Where conf/ is, and what may stand in it: everything wrong with a configuration is told at once.

Imports neither torch nor lightning: a typo costs a second, not a model load.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.contradictions import contradictions, unmeasured_search, without_effect
from dpo_lightning.keys import TRAINER_KEYS, targets_of, untrusted, wrong_keys
from dpo_lightning.paths import fresh_name
from dpo_lightning.types import UserError

PACKAGE = Path(__file__).resolve().parent
# In a wheel conf/ lies in the package, in a checkout beside it; pyproject.toml's force-include is the other half.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
# Those of which every configuration has an option.
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"experiment", "sweep"}

TRAINER = "lightning.pytorch.Trainer"

Check = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(holds: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, ListConfig) and len(value) > 0 and all(holds(item) for item in value)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def _either(check: Check, *words: str) -> Check:
    return lambda value: value in words or check[0](value), f"{check[1]}, or {' or '.join(words)}"


def _one_of(*words: str) -> Check:
    return lambda value: value in words, f"one of {', '.join(words)}"


def _word(pattern: str, must_be: str) -> Check:
    """Return a check of text without blanks, as it goes into a header of a job."""
    return lambda v: isinstance(v, str | int) and bool(re.fullmatch(pattern, str(v), re.ASCII)), must_be


POSITIVE: Check = lambda v: _number(v) and v > 0, "a number above 0"
NOT_NEGATIVE: Check = lambda v: _number(v) and v >= 0, "a number, 0 or more"
COUNT: Check = lambda v: _integer(v) and v > 0, "a whole number above 0"
SHARE: Check = lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"
SMOOTHING: Check = lambda v: _number(v) and 0 <= v < 0.5, "a number from 0 to below 0.5"
FLAG: Check = lambda v: isinstance(v, bool), "true or false"
TEXT: Check = lambda v: isinstance(v, str) and bool(v.strip()), "text"
TEXTS: Check = lambda v: v == [] or _list_of(TEXT[0], v), "a list of texts"
NAMES: Check = lambda v: TEXT[0](v) or _list_of(TEXT[0], v), "a name or a list of names"
LIMIT: Check = (
    lambda v: (_integer(v) and v >= 0) or (isinstance(v, float) and 0 <= v <= 1),
    "a whole number of batches, or a share from 0.0 to 1.0",
)
SOME: Check = lambda v: LIMIT[0](v) and v > 0, "a whole number of batches above 0, or a share above 0.0 up to 1.0"
SPAN: Check = (  # a mapping is timedelta's keywords
    lambda v: isinstance(v, DictConfig) or (isinstance(v, str) and bool(re.fullmatch(r"\d+(:\d\d){3}", v.strip()))),
    "days, hours, minutes and seconds, such as 00:12:00:00, in YAML in quotes",
)
STEPS: Check = lambda v: _integer(v) and (v > 0 or v == -1), "a whole number above 0, or -1 for no limit"
DEVICES: Check = (
    lambda v: bool(re.fullmatch(r"auto|-1|\d+(,\d*)*", str(v)) and v != 0) or _list_of(_integer, v),
    "a number of devices, a list of their numbers, or auto",
)
OPTION: Check = _word(r"--[a-z][a-z-]*(=[\w./:@%+=,&|*()\[\]-]+)?", "an option of sbatch")
NAME: Check = _word(r"[\w.,@+-]+", "a name")
BETAS: Check = lambda v: _list_of(SHARE[0], v) and len(v) == 2, "two numbers below 1"

CHECKS: dict[str, Check] = {
    "seed": (lambda v: _integer(v) and 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1"),
    "skip_spikes": _optional(POSITIVE),
    "run_dir": _optional(TEXT),
    "resume": TEXT,
    "resume_allow": TEXTS,
    "checkpoint.every_n_steps": _optional(COUNT),
    "checkpoint.keep_last": _optional(COUNT),
    "cluster.hang_seconds": _optional((lambda v: _number(v) and v >= 1, "a number of seconds, 1 or more")),
    "cluster.slow_factor": (lambda v: _number(v) and v > 1, "a number above 1"),
    "cluster.max_restarts": _optional((lambda v: _integer(v) and v >= 0, "a whole number, 0 or more")),
    "slurm.partition": _optional(NAME),
    "slurm.account": _optional(NAME),
    "slurm.qos": _optional(NAME),
    "slurm.time": _optional(_word(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}", "like 04:00:00 or 1-12, in YAML in quotes")),
    "slurm.gpus_per_node": _optional(_word(r"([\w.-]+:)?\d+", "a number of GPUs, or kind:number")),
    "slurm.cpus_per_task": _optional(COUNT),
    "slurm.mem": _optional(_word(r"\d+[KMGT]?", "like 256G; 0 is all of a node's")),
    "slurm.constraint": _optional(_word(r"[\w.,:&|*()\[\]-]+", "features of nodes")),
    "slurm.container": _optional(_word(r"[\w./:@#+=-]+", "an image's name or path")),
    "slurm.extra": (lambda v: v == [] or _list_of(OPTION[0], v), "a list of options of sbatch, like --exclusive"),
    "slurm.dry_run": FLAG,
    "optimized_metric": _one_of("val/loss", "val/rewards/accuracies", "val/rewards/margins"),
    "export.merge": FLAG,
    "export.hub_id": _optional(TEXT),
    "samples.count": (lambda v: _integer(v) and v >= 0, "a whole number, 0 or more"),
    "samples.max_new_tokens": COUNT,
    "trusted_targets": TEXTS,
    "model.name": TEXT,
    "model.base_model": _optional(TEXT),
    "model.note": _optional(TEXT),
    "model.init": _one_of("pretrained", "random"),
    "model.architecture": _optional(TEXT),
    "model.dimensions": (lambda v: isinstance(v, DictConfig), "a mapping of config fields"),
    "model.tokenizer": _optional(TEXT),
    "model.gradient_checkpointing": FLAG,
    "data.path": _optional(TEXT),
    "data.val_path": _optional(TEXT),
    "data.name": _optional(TEXT),
    "data.subset": _optional(TEXT),
    "data.split": TEXT,
    "data.val_split": _optional(TEXT),
    "data.max_pairs": _optional(COUNT),
    "data.max_length": (lambda v: _integer(v) and v >= 8, "a whole number of tokens, 8 or more"),
    "data.val_fraction": SHARE,
    "data.template": _one_of("auto", "chat", "plain"),
    "data.layout": _one_of("auto", "shared", "padded"),
    "data.batch_size": COUNT,
    "data.shuffle": FLAG,
    "lora.r": COUNT,
    "lora.lora_alpha": POSITIVE,
    "lora.lora_dropout": SHARE,
    "lora.target_modules": NAMES,
    "reference.mode": _one_of("auto", "adapter_off", "frozen_copy", "cached"),
    "reference.offload": FLAG,
    "loss.beta": POSITIVE,
    "loss.label_smoothing": SMOOTHING,
    "loss.sft_weight": NOT_NEGATIVE,
    "optim.lr": _either(POSITIVE, "auto"),
    "optim.betas": BETAS,
    "optim.eps": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.schedule": _one_of("cosine", "linear", "constant"),
    "optim.warmup_fraction": SHARE,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": COUNT,
    "trainer.precision": _one_of("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "trainer.max_epochs": _optional(STEPS),
    "trainer.max_steps": STEPS,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": _optional(NOT_NEGATIVE),
    "trainer.log_every_n_steps": COUNT,
    "trainer.limit_train_batches": SOME,
    "trainer.limit_val_batches": LIMIT,
    "trainer.val_check_interval": SOME,
    "trainer.num_sanity_val_steps": (lambda v: _integer(v) and v >= -1, "a whole number, or -1 for all"),
    "trainer.deterministic": _either(FLAG, "warn", "auto"),
    "trainer.max_time": _optional(SPAN),
    "trainer.benchmark": _optional(FLAG),
    "trainer.detect_anomaly": FLAG,
    "trainer.inference_mode": FLAG,
    "strategy.name": _one_of("auto", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"),
    "logger.project": _optional(TEXT),
    "logger.entity": _optional(TEXT),
    "logger.name": _optional(TEXT),
    "logger.tags": TEXTS,
}


def check(cfg: DictConfig, overrides: Sequence[str] = (), search: bool = False) -> None:
    """Raise one UserError with every problem of a composed configuration and of what it was given, a line each.

    search: a sweeper goes by `optimized_metric`.
    """
    check_values(cfg)
    unmeasured = unmeasured_search(cfg) if search else ()
    if problems := [*contradictions(cfg), *unmeasured, *without_effect(cfg, overrides)]:
        raise UserError("\n".join(problems))


def check_values(cfg: DictConfig) -> None:
    """Raise one UserError with every key and value that is wrong by itself, a line each."""
    problems = [*_missing(cfg), *_wrong_values(cfg)]
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation: told above, unless it stands in a list
        raise UserError("\n".join(problems or str(error).splitlines()[:1])) from None
    root: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    problems += [*wrong_keys(plain, root, GROUPS, _shipped()), *untrusted(plain, trusted(cfg))]
    if problems:
        raise UserError("\n".join(problems))


def trusted(cfg: DictConfig) -> set[str]:
    """Return the targets that may be instantiated: those of the shipped YAML and trusted_targets."""
    own = cfg.get("trusted_targets")
    return {*_shipped(), *(own if isinstance(own, ListConfig) else ())}


@functools.cache
def _shipped() -> dict[str, list[set[str]]]:
    """Return, for each _target_ of the shipped YAML, the keys of every file that names it."""
    shipped: dict[str, list[set[str]]] = {}
    for file in CONF.rglob("*.yaml"):
        for _, node in targets_of(OmegaConf.to_container(OmegaConf.load(file))):
            shipped.setdefault(node["_target_"], []).append({*node} - {"defaults"})
    shipped[TRAINER].append(shipped[TRAINER][0] | TRAINER_KEYS)
    return shipped


def _missing(cfg: DictConfig) -> list[str]:
    return [f"{key} is not set: give {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))]


def _wrong_values(cfg: DictConfig) -> Iterator[str]:
    for key in keys_of(cfg):
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=False)
        except OmegaConfBaseException as error:
            yield f"{key}: {str(error).splitlines()[0]}"
            continue
        holds, must_be = CHECKS.get(key, (None, ""))
        if holds and not (OmegaConf.is_missing(cfg, key) or holds(value)):
            told = str(value).replace("\n", " ")
            yield f"{key}={told}: must be {must_be}"


def keys_of(cfg: Any, prefix: str = "") -> list[str]:
    """Return the dotted name of every key in `cfg`, leaves and groups."""
    if not isinstance(cfg, DictConfig):
        return []
    names = [(f"{prefix}{key}", cfg._get_node(key)) for key in cfg]
    return [key for name, node in names for key in (name, *keys_of(node, f"{name}."))]


def run_dir_of(cfg: DictConfig, job: int | None = None) -> Path:
    """Return the run's folder, the same on every rank.

    `run_dir=` sets it, and a `job` of --multirun has the folder of its number in it; a SLURM job's is named after the
    job, so that a requeued job finds it again; otherwise it is dated by the first process, and the ranks that process
    starts read its choice from the environment.
    """
    if cfg.run_dir is not None:
        return Path(cfg.run_dir, "" if job is None else str(job)).absolute()
    # Of a sweep's earlier trial both can be left: Lightning sets LOCAL_RANK in the first process, too.
    if job is None and "DPO_LIGHTNING_RUN_DIR" in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ["DPO_LIGHTNING_RUN_DIR"])
    slurm = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"slurm-{slurm}{f'_{task}' if task else ''}" if slurm else fresh_name()
    path = Path("runs", name if job is None else f"{name}_{job}").absolute()
    os.environ["DPO_LIGHTNING_RUN_DIR"] = str(path)
    return path
