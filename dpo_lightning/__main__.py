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
import os
import re
import sys
import warnings
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.config import CONF, check, keys_of, nearest
from dpo_lightning.hub import prefer_cache
from dpo_lightning.types import UserError

USER_ERROR = 2
VERBS = ("train", "check", "export", "report", "compare")


def run(verb: str, cfg: DictConfig) -> int:
    """Do what the verb says with a composed configuration; return the exit code."""
    if verb in ("export", "report", "compare"):
        from dpo_lightning.outputs import verbs

        return getattr(verbs, verb)(cfg)
    check(cfg)
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    prefer_cache(cfg)
    from dpo_lightning import train

    if verb == "check":
        return train.only_check(cfg)
    return train.train(cfg, job=hydra_config.job.num if multirun else None)


def main() -> None:
    """Enter from the command line."""
    verb = sys.argv.pop(1) if len(sys.argv) > 1 and re.fullmatch(r"[a-z]+", sys.argv[1]) else "train"
    if verb not in VERBS:
        fail(f"unknown verb {verb}{nearest(verb, list(VERBS))}; there are {', '.join(VERBS)}")
    quiet()
    keep_freed_memory()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its errors itself and exits with 1
    codes: list[int] = []

    def task(cfg: DictConfig) -> None:
        try:
            codes.append(run(verb, cfg))
        except UserError as error:
            fail(str(error))

    entry: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    sys.exit(max(codes, default=0))


def quiet() -> None:
    """Keep other packages' notes to their own developers, each known one by its message, off the screen."""
    for text in (r".*treespec, LeafSpec.*", r".*is_gradient_checkpointing. is deprecated.*"):
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
    """Return Hydra's complaint as one line, with the nearest key or option."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'|Could not append to config.*'([^']+)'", text):
        key = found[1] or found[2]
        return f"unknown key {key}{nearest(key, known_keys())}; `--cfg job` prints all keys"
    if found := re.search(r"Could not find '([^']+)/([^']+)'", text):
        options = re.findall(r"\t(\S+)", text.partition("Config search path")[0])
        return f"{found[1]}={found[2]}: no such option{nearest(found[2], options)}; there are {', '.join(options)}"
    return " ".join(text.split())


def known_keys() -> list[str]:
    """Return every key of the default configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return keys_of(compose("config"))


if __name__ == "__main__":
    main()
