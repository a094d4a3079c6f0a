"""The command line: python -m dpo_lightning [verb] key=value ...; conf/config.yaml's help tells of the verbs.

Imports nothing heavy: a mistake in a key is told within a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning import __version__
from dpo_lightning.checkpoints import lock
from dpo_lightning.checkpoints.folder import step_of
from dpo_lightning.checkpoints.resume import is_first_process, to_resume
from dpo_lightning.checkpoints.starts import announce, check_progress, note
from dpo_lightning.cli import guard
from dpo_lightning.cli.errors import explain, fail
from dpo_lightning.cli.hub import prefer_cache
from dpo_lightning.cli.process import importing, prepare
from dpo_lightning.cli.secrets import without_passwords
from dpo_lightning.cli.trials import check_trials, is_override
from dpo_lightning.cluster.exits import DONE, INTERRUPTED, USER_ERROR, WRONG_NUMBERS
from dpo_lightning.config import CONF, check, check_values, run_dir_of
from dpo_lightning.keys import nearest
from dpo_lightning.paths import at_home
from dpo_lightning.types import RunError, UserError

VERBS = ("train", "check", "submit", "export", "report", "compare")
READS = {"export": ("run_dir", "export.merge"), "report": ("run_dir",), "compare": ("run_dir",)}


def run(verb: str, cfg: DictConfig) -> tuple[int, float | None]:
    """Do what the verb says with a composed configuration; return the exit code, and what a sweep optimises."""
    hydra_config = HydraConfig.get()
    if verb in READS:
        check_values(cfg)
        warn_of_ignored(verb, hydra_config.overrides.task)
        with importing():
            from dpo_lightning.outputs import verbs

        return getattr(verbs, verb)(cfg), None
    multirun = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    search = multirun and not hydra_config.sweeper._target_.endswith(".BasicSweeper")
    if multirun and not search and hydra_config.job.num == 0:
        check_trials(str(hydra_config.job.config_name))
    check(cfg, hydra_config.overrides.task, search)
    judge_rows(cfg)
    if verb == "submit":
        return submit(cfg, multirun), None
    warn_of_slurm(hydra_config.overrides.task)
    run_dir = run_dir_of(cfg, hydra_config.job.num if multirun else None)
    try:
        code = begin(verb, cfg, run_dir, sweep=multirun or "WANDB_SWEEP_ID" in os.environ)
    finally:
        lock.let_go(run_dir)
    from dpo_lightning.outputs.results import last

    return code, last(run_dir, cfg.optimized_metric) if multirun and verb == "train" and code == DONE else None


def begin(verb: str, cfg: DictConfig, run_dir: Path, sweep: bool) -> int:
    """Train or check in a run's folder, from the checkpoint that it goes on from; return the exit code."""
    trains, first = verb == "train", is_first_process()
    if first and (trains or lock.is_restarted()):  # a job's check waits, before its ranks look for a checkpoint
        lock.take(run_dir)
    line = line_of(cfg)
    resume = to_resume(cfg.resume, run_dir, tidy=trains, line=line)
    if trains:
        step = step_of(resume) if resume else 0
        check_progress(run_dir, step, cfg.cluster.max_restarts, first)
        if first:
            announce(run_dir, step, line)
    try:
        prefer_cache(cfg)
        with importing():
            from dpo_lightning import train

        return (train.train if trains else train.only_check)(cfg, run_dir, resume, sweep)
    except (UserError, HydraException, OmegaConfBaseException, KeyboardInterrupt) as error:
        if trains and first and not isinstance(error, lock.Taken):  # nothing that another start would repeat
            note(run_dir, end=INTERRUPTED if isinstance(error, KeyboardInterrupt) else USER_ERROR)
        raise


def line_of(cfg: DictConfig) -> str:
    """Return a text by which a start is known that is made again as it was, as a requeued job's is."""
    keys: Any = OmegaConf.to_container(cfg)
    asked = {key: value for key, value in keys.items() if key not in ("run_dir", "slurm")}
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def warn_of_ignored(verb: str, overrides: Sequence[str]) -> None:
    """Say which of the given keys a verb on finished runs does not read."""
    for override in overrides:
        if override.lstrip("+~").partition("=")[0] not in READS[verb]:
            print(f"warning: {override} has no effect: {verb} reads {' and '.join(READS[verb])}", file=sys.stderr)


def warn_of_slurm(overrides: Sequence[str]) -> None:
    """Say that what is asked of sbatch has no effect on a run that is begun at once."""
    for override in overrides:
        if override.lstrip("+~").startswith("slurm."):
            print(f"warning: {override} has no effect: submit alone reads it", file=sys.stderr)


def submit(cfg: DictConfig, multirun: bool) -> int:
    """Make a SLURM job of what has been checked as far as no model is needed; return the exit code."""
    from dpo_lightning.cli import submit as job

    if multirun:
        raise UserError("--multirun: not with submit; launch/sweep.sbatch runs a W&B sweep as SLURM jobs")
    run_dir = job.folder_of(cfg)
    to_resume(cfg.resume, run_dir, tidy=False, line=line_of(cfg))
    return job.submit(cfg, run_dir, sys.argv[1:])


def judge_rows(cfg: DictConfig) -> None:
    """Read the rows of files: a bad one is told before the seconds that importing torch and lightning takes."""
    from dpo_lightning.data.prepare import validate
    from dpo_lightning.data.sources import FileSource

    for key in ("data.path", "data.val_path"):
        if path := OmegaConf.select(cfg, key):
            validate(FileSource(path, key))


def attempt(verb: str, cfg: DictConfig, codes: list[int]) -> float | None:
    """Run one job, alone or of a sweep, and note its exit code; return what the sweep optimises.

    A sweep goes on after a trial that has diverged. Anything else that ends a job ends the sweep.
    """
    reached = None
    try:
        code, reached = run(verb, cfg)
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except RunError as error:
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        code = error.exit_code
    codes.append(code)
    if code not in (DONE, WRONG_NUMBERS):
        sys.exit(code)
    return reached


def main() -> None:
    """Enter from the command line."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(f"dpo_lightning {__version__}")
        sys.exit(0)
    verb = sys.argv.pop(1) if len(sys.argv) > 1 and re.fullmatch(r"[a-z]+", sys.argv[1]) else "train"
    if verb not in VERBS:
        fail(f"unknown verb {verb}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    prepare(outlives=verb == "train")
    # Hydra's parser takes its flags before the overrides or behind them, not between: the overrides go last.
    sys.argv[1:] = sorted(map(at_home, sys.argv[1:]), key=is_override)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its errors itself and exits with 1
    guard.install()
    codes: list[int] = []
    running: list[str] = []

    def task(cfg: DictConfig) -> float | None:
        running.append(verb)
        reached = attempt(verb, cfg, codes)
        running.clear()
        return reached

    entry: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if running or isinstance(error, AssertionError):  # a fault in a program, no user's mistake
            raise
        if codes and {*codes} == {WRONG_NUMBERS}:  # the sweeper has found no best one
            print(f"error: each of the {len(codes)} trials has diverged", file=sys.stderr)
            sys.exit(WRONG_NUMBERS)
        fail(explain(error))  # Hydra raises a dozen kinds for what cannot be composed
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    main()
