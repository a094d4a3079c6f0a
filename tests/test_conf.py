"""conf/ as a whole: every option composes, every target takes its keywords, every value has a check."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from dpo_lightning.config import CHECKS, CONF, check, keys_of
from dpo_lightning.keys import TRAINER_KEYS, targets_of, wrong_keys
from dpo_lightning.types import UserError

FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [f"{file.parent.name}={file.stem}" for file in FILES if file.parent != CONF]
# What train.py itself gives the Trainer; none of it can be set.
GIVEN_BY_TRAIN = {
    "callbacks", "default_root_dir", "enable_checkpointing", "enable_model_summary", "enable_progress_bar", "logger",
    "plugins",
    "strategy", "use_distributed_sampler",
}  # fmt: skip
# What the Trainer takes and a training here has no use for.
NO_USE = {
    "barebones", "enable_autolog_hparams", "fast_dev_run", "gradient_clip_algorithm", "limit_predict_batches",
    "limit_test_batches",
    "model_registry", "overfit_batches", "reload_dataloaders_every_n_epochs", "sync_batchnorm",
}  # fmt: skip


@functools.cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node)


def raw(option: str) -> dict[str, Any]:
    group, name = option.split("=")
    return plain(OmegaConf.load(CONF / group / f"{name}.yaml"))


def parents(option: str) -> list[str]:
    """The options that an option's own defaults list names."""
    group = option.partition("=")[0]
    named = [entry if isinstance(entry, dict) else {group: entry} for entry in raw(option).get("defaults", [])]
    return [f"{key.removeprefix('override /')}={value}" for entry in named for key, value in entry.items()]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    elif prefix:
        yield prefix, node


def test_conf_is_found_whole() -> None:
    assert len(FILES) >= 35
    groups = "callbacks data experiment logger lora loss model optim reference strategy trainer"
    assert {folder.name for folder in CONF.iterdir() if folder.is_dir()} >= {*groups.split()}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_its_targets_take_its_keywords(option: str) -> None:
    found = list(targets_of(plain(composed(option))))
    assert len(found) >= 8
    for name, node in found:
        keywords = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
        try:
            inspect.signature(get_object(node["_target_"])).bind_partial(**keywords)
        except TypeError as error:
            pytest.fail(f"{option}: {name}: {error}")


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_accepted_unless_it_demands_a_value(option: str) -> None:
    demanded = [f"{option.partition('=')[0]}.{key}" for key, value in leaves(raw(option)) if value == "???"]
    if option == "data=base":
        demanded = ["data.path"]  # what the other options build on
    if not demanded:
        check(composed(option))
        return
    with pytest.raises(UserError, match=rf"{demanded[0]}\b"):
        check(composed(option))


@pytest.mark.parametrize("option", [option for option in OPTIONS if parents(option)])
def test_option_is_a_diff(option: str) -> None:
    """No value is one that it inherits, and no key one that nothing inherited has. Experiments may name any group."""
    group = option.partition("=")[0]
    inherited = plain(composed(*parents(option)))
    known = dict(leaves(inherited if group in ("experiment", "sweep") else inherited[group]))
    for key, value in leaves({key: value for key, value in raw(option).items() if key not in ("defaults", "hydra")}):
        assert key in known or key.startswith("dimensions."), f"{option}: nothing knows {key}"
        assert key not in known or known[key] != value, f"{option}: {key}: {value} is inherited already"


def test_option_without_content_is_an_alias() -> None:
    assert [option for option in OPTIONS if {*raw(option)} == {"defaults"}] == ["loss=sigmoid"]


def test_every_check_has_a_key_and_every_key_a_check() -> None:
    free = ("_target_", "_partial_")
    configs = [composed(option) for option in OPTIONS]
    keys = {key for cfg in configs for key in keys_of(cfg) if not isinstance(OmegaConf.select(cfg, key), DictConfig)}
    unchecked = {key for key in keys if key.rpartition(".")[2] not in free} - {*CHECKS}
    assert {*CHECKS} <= keys | {"model.dimensions"} | {f"trainer.{key}" for key in TRAINER_KEYS}
    assert not {key for key in unchecked if not key.startswith("model.dimensions.")}


def test_trainer_keys_are_the_trainers() -> None:
    """A Lightning that takes another keyword is noticed here."""
    takes = {*inspect.signature(pl.Trainer).parameters}
    in_conf = {*composed().trainer} - {"_target_"}
    assert in_conf | TRAINER_KEYS | GIVEN_BY_TRAIN | NO_USE == takes
    assert len(in_conf) + len(TRAINER_KEYS) + len(GIVEN_BY_TRAIN) + len(NO_USE) == len(takes)


def test_wrong_keys_tells_of_keys_too_many_and_too_few() -> None:
    shipped = {"pkg.dpo": [{"_target_", "beta"}]}
    root, groups = {"seed": 1, "export": {"merge": False}}, {"loss", "callbacks"}
    good = {"seed": 1, "export": {"merge": True}, "loss": {"_target_": "pkg.dpo", "beta": 1}, "callbacks": {}}
    assert list(wrong_keys(good, root, groups, shipped)) == []
    bad = {"sed": 1, "export": {"merge": True}, "loss": {"_target_": "pkg.dpo", "betta": 1}, "callbacks": {"bar": 1}}
    assert list(wrong_keys(bad, root, groups, shipped)) == [
        "unknown key sed: nothing reads it; did you mean seed?",
        "seed is missing: give it a value, do not take it away",
        "unknown key loss.betta: nothing reads it; did you mean loss.beta?",
        "loss.beta is missing: give it a value, do not take it away",
        "callbacks.bar has no _target_: give one of the options of callbacks=",
    ]
