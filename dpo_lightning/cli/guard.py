"""Hydra runs some of what YAML names before a task sees it; here that is held to the same trust as the rest."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import hydra._internal.hydra as hydra_runner
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from dpo_lightning.cli import secrets
from dpo_lightning.cli.errors import builds_on_nothing, fail
from dpo_lightning.config import GROUPS, trusted
from dpo_lightning.keys import untrusted


def install() -> None:
    """Let Hydra compose through `GuardedLoader`; leave where the command line holds a secret, which it may repeat."""
    if problems := list(secrets.in_arguments(sys.argv[1:])):
        fail("\n".join(problems))
    hydra_runner.ConfigLoaderImpl = GuardedLoader  # type: ignore[misc]


class GuardedLoader(ConfigLoaderImpl):
    """Refuses what Hydra itself would run before `check` sees it: any YAML may put something under hydra.*."""

    def load_configuration(self, *args: Any, **options: Any) -> DictConfig:
        """Return the composed configuration; leave where it holds a secret, or names code that is not trusted."""
        cfg = super().load_configuration(*args, **options)
        if problems := list(secrets.in_config(cfg)) or list(hidden_code(cfg)):
            fail("\n".join(problems))
        if cfg.hydra.job.config_name != "config" and (
            lacking := [group for group in sorted(GROUPS) if group not in cfg]
        ):
            fail(builds_on_nothing(", ".join(lacking)))
        return cfg


def hidden_code(cfg: DictConfig) -> Iterator[str]:
    """Tell of untrusted code that Hydra would call: targets, and factories and classes of the logging's configuration.

    The sweeper and the launcher themselves are held to Hydra's own plug-ins by Hydra; what is in them is not.
    """
    plugins = ("sweeper", "launcher")
    hidden = {key: OmegaConf.to_container(cfg.hydra[key], resolve=True) for key in ("callbacks", *plugins)}
    yield from untrusted(hidden, trusted(cfg) | {cfg.hydra[key]._target_ for key in plugins}, "hydra")
    for key in ("job_logging", "hydra_logging"):
        if OmegaConf.to_container(cfg.hydra[key]) not in hydras_own(key):
            yield f"hydra.{key}: only one of Hydra's own options is accepted; leave hydra.{key} out"


@functools.cache
def hydras_own(group: str) -> list[Any]:
    """Return the options that Hydra ships for one of its groups."""
    files = Path(hydra.__file__).parent.glob(f"conf/hydra/{group}/*.yaml")
    return [OmegaConf.to_container(OmegaConf.load(file)) for file in files]
