"""python -m dpo_lightning [verb] key=value ...

    train    train what the keys describe (the default)
    check    read configuration and rows, load no model
    export   run_dir=RUN export.merge=true: merge a finished run's adapter into its base, into RUN/model
    report   run_dir=RUN: write report.html and plots anew
    compare  run_dir=RUN,RUN,...: the runs' last validations side by side

Imports nothing heavy: a mistake in a key is told within a second.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import hydra._internal.hydra as hydra_runner
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.config import CONF, check, check_values, keys_of, trusted
from dpo_lightning.hub import prefer_cache
from dpo_lightning.keys import nearest, untrusted
from dpo_lightning.types import UserError

USER_ERROR = 2
NOISE = (  # known warnings that do not concern the user, each by its message
    r".*treespec, LeafSpec.*",
    r".*is_gradient_checkpointing. is deprecated.*",
    r"Found .* module.s. in eval mode at the start of training.*",  # the frozen reference
    r".*your dataloader is not resumable.*",  # the data module keeps its position
)
VERBS = ("train", "check", "export", "report", "compare")
READS = {"export": ("run_dir", "export.merge"), "report": ("run_dir",), "compare": ("run_dir",)}


def run(verb: str, cfg: DictConfig) -> int:
    """Do what the verb says with a composed configuration; return the exit code."""
    hydra_config = HydraConfig.get()
    if verb in READS:
        check_values(cfg)
        warn_of_ignored(verb, hydra_config.overrides.task)
        from dpo_lightning.outputs import verbs

        return getattr(verbs, verb)(cfg)
    check(cfg)
    judge_rows(cfg)
    multirun = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    prefer_cache(cfg)
    from dpo_lightning import train

    if verb == "check":
        return train.only_check(cfg)
    return train.train(cfg, job=hydra_config.job.num if multirun else None)


def warn_of_ignored(verb: str, overrides: Sequence[str]) -> None:
    """Say which of the given keys a verb on finished runs does not read."""
    for override in overrides:
        if override.lstrip("+~").partition("=")[0] not in READS[verb]:
            print(f"warning: {override} has no effect: {verb} reads {' and '.join(READS[verb])}", file=sys.stderr)


def judge_rows(cfg: DictConfig) -> None:
    """Read the rows of files: a bad one is told before the seconds that importing torch and lightning takes."""
    from dpo_lightning.data.prepare import validate
    from dpo_lightning.data.sources import FileSource

    for key in ("data.path", "data.val_path"):
        if path := OmegaConf.select(cfg, key):
            validate(FileSource(path))


def main() -> None:
    """Enter from the command line."""
    verb = sys.argv.pop(1) if len(sys.argv) > 1 and re.fullmatch(r"[a-z]+", sys.argv[1]) else "train"
    if verb not in VERBS:
        fail(f"unknown verb {verb}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    quiet()
    keep_freed_memory()
    # Hydra's parser takes its flags before the overrides or behind them, not between: the overrides go last.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda arg: re.match(r"~|[^-].*=", arg) is not None)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its errors itself and exits with 1
    hydra_runner.ConfigLoaderImpl = GuardedLoader  # type: ignore[misc]
    codes: list[int] = []
    running: list[str] = []

    def task(cfg: DictConfig) -> None:
        running.append(verb)
        try:
            codes.append(run(verb, cfg))
        except UserError as error:
            fail(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            fail(explain(error))
        running.clear()

    entry: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    try:
        entry()
    except Exception as error:
        if running:
            raise
        fail(explain(error))  # Hydra raises a dozen kinds for what cannot be composed
    sys.exit(max(codes, default=0))


class GuardedLoader(ConfigLoaderImpl):
    """Refuses what Hydra itself would run before `check` sees it: any YAML may put something under hydra.*."""

    def load_configuration(self, *args: Any, **options: Any) -> DictConfig:
        """Return the composed configuration; leave where it names code that is not trusted."""
        cfg = super().load_configuration(*args, **options)
        if problems := list(hidden_code(cfg)):
            fail("\n".join(problems))
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


def quiet() -> None:
    """Keep other packages' chatter off the screen."""
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of handing it back: a training touches the same gigabytes every step.

    Without this every large temporary of a CPU run is mapped anew, page fault by page fault (2x on elementwise
    chains of 32 MiB tensors); THP_MEM_ALLOC_ENABLE lets torch ask for huge pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 256 << 20)


def fail(text: str) -> None:
    """Print a line for each problem and leave with the exit code of a user's mistake."""
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(USER_ERROR)


def explain(error: Exception) -> str:
    """Return Hydra's complaint as one line that names the override, with the nearest key or option."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return no_such_key(found[1])
    if found := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"+{found[1]}: there is such a key already; leave the + out"
    if found := re.search(r"Could not (?:find|load) '([^'/]+)/([^']+)'", text):
        options = re.findall(r"\t(\S+)", text.partition("Config search path")[0])
        options = options or sorted(file.stem for file in (CONF / found[1]).glob("*.yaml"))
        return f"{found[1]}={found[2]}: no such option{nearest(found[2], options)}; there are {', '.join(options)}"
    if override := getattr(error, "override", None):
        return f"{override}: not of the form key=value; put it in quotes if it has special characters: 'key=\"value\"'"
    text = " ".join(text.split())
    if "Config group override must be" in text:
        given = [arg for arg in sys.argv if re.match(r"\w*=", arg) and (CONF / arg.partition("=")[0]).is_dir()]
        text = f"{' '.join(given)}: a group takes the name of one of its options, for instance lora=none"
    return text


def no_such_key(key: str) -> str:
    """Return what to say of a key that the composed configuration does not have."""
    known = known_keys()
    if key in known:
        return f"{key}: the chosen option of {key.partition('.')[0]}= has no such key; choose another or leave it out"
    return f"unknown key {key}{nearest(key, known)}; `--cfg job` prints all keys"


def known_keys() -> list[str]:
    """Return every key of the default configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return keys_of(compose("config"))


if __name__ == "__main__":
    main()
