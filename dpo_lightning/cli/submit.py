"""submit: the job that trains what the keys describe, as one file for sbatch: a header and launch/train.sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from dpo_lightning.config import PACKAGE
from dpo_lightning.paths import fresh_name
from dpo_lightning.types import UserError

# In a wheel launch/ lies in the package, in a checkout beside it; pyproject.toml's force-include is the other half.
LAUNCH = PACKAGE / "launch" if (PACKAGE / "launch").is_dir() else PACKAGE.parent / "launch"
SCRIPT = LAUNCH / "train.sbatch"
OURS = ("array", "nodes", "ntasks", "ntasks-per-node", "output", "wrap")  # options that follow from other keys


def folder_of(cfg: DictConfig) -> Path:
    """Return the run folder that the job will have: run_dir, or one dated now."""
    return Path(cfg.run_dir or Path("runs", fresh_name())).absolute()


def submit(cfg: DictConfig, run_dir: Path, words: Sequence[str]) -> int:
    """Write the job's file into the run folder and hand it to sbatch, or only write it; return the exit code.

    Args:
        cfg: the checked configuration.
        run_dir: the job's run folder, which every node has to see.
        words: the command line that made `cfg`, without the verb.

    Raises UserError for what no job can be made of, where there is no sbatch, where the folder cannot be written, and
    for what sbatch refuses.

    """
    options = options_of(cfg, run_dir)
    if not cfg.slurm.dry_run and shutil.which("sbatch") is None:
        raise UserError("sbatch: no such command here; submit from a login node, or write the file alone with "
                        "slurm.dry_run=true")  # fmt: skip
    file = run_dir / "job.sbatch"
    # The script reads it among the words: a YAML of --config-dir may have given it.
    kind = f"trainer.accelerator={cfg.trainer.accelerator}"
    text = job_text(cfg, options, [*_kept(words), kind, f"run_dir={_hydra_quoted(str(run_dir))}"])
    try:
        run_dir.mkdir(parents=True, exist_ok=cfg.run_dir is not None)
        file.write_text(text)
    except FileExistsError:
        raise UserError(f"run_dir={run_dir}: another job was submitted in this second; submit once more") from None
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error}); free space or choose another") from error
    if cfg.slurm.dry_run:
        print(f"written, not submitted: sbatch {shlex.quote(str(file))}")
        return 0
    # Once more on the command line: SBATCH_* variables of the environment go before what stands in the file.
    command = ["sbatch", "--parsable", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{done.stderr.strip() or 'sbatch: refused, and does not say why'}\n{file} is what it refused")
    job = done.stdout.strip().partition(";")[0]
    print(f"job {job}: {run_dir}\nlog: {run_dir}/slurm-{job}.out")
    return 0


def options_of(cfg: DictConfig, run_dir: Path) -> list[str]:
    """Return sbatch's options: those of launch/train.sbatch, with what the keys say in their place.

    Raises UserError where the size of the job does not follow from the keys, or where they contradict each other.
    """
    devices, slurm = cfg.trainer.devices, cfg.slurm
    if not re.fullmatch(r"[1-9][0-9]*", str(devices)):
        raise UserError(f"trainer.devices={devices}: a job has to know its size; give trainer.devices=8, for instance")
    if re.search(r"[^ -~]|[\"'\\$`]", str(run_dir)):
        raise UserError(
            f"run_dir={run_dir}: quotes, $ and what is not ASCII do not go into a job; choose another folder"
        )
    for option in slurm.extra:
        if (name := re.match(r"--([a-z-]+)", option)) and name[1] in OURS:
            raise UserError(f"slurm.extra: {option} follows from trainer.devices, trainer.num_nodes and run_dir")
    gpus = slurm.gpus_per_node
    if gpus is None and cfg.trainer.accelerator != "cpu":
        gpus = devices
    chosen = {
        "nodes": cfg.trainer.num_nodes, "ntasks-per-node": devices, "cpus-per-task": slurm.cpus_per_task,
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time,
        "mem": slurm.mem, "constraint": slurm.constraint, "gpus-per-node": gpus,
        "output": f"{run_dir}/slurm-%j.out".replace("%", "%%").replace("%%j.out", "%j.out"),
    }  # fmt: skip
    options: dict[str, object] = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    if gpus in (None, 0, "0"):
        del options["gpus-per-node"]
        chosen["gpus-per-node"] = None
    options |= {name: value for name, value in chosen.items() if value is not None}
    return [f"--{name}={value}" if value != "" else f"--{name}" for name, value in options.items()] + [*slurm.extra]


def job_text(cfg: DictConfig, options: Sequence[str], words: Sequence[str]) -> str:
    """Return the file for sbatch: `options` as its header, then `words`, quoted, as launch/train.sbatch's arguments."""
    settings: Mapping[str, str] = {
        "CONTAINER": cfg.slurm.container or "",
        "PYTHON": "python" if cfg.slurm.container else sys.executable,
    }
    _, *script = SCRIPT.read_text().splitlines()
    return "\n".join([
        "#!/usr/bin/env bash", *(f"#SBATCH {_header_quoted(option)}" for option in options),
        "# Written by: python -m dpo_lightning submit. Below is its launch/train.sbatch; sbatch takes this file again.",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *(f"{name}={shlex.quote(value)}" for name, value in settings.items()),
        f"set -- {shlex.join(words)}", "",
        *(line for line in script if not line.startswith("#SBATCH ")), "",
    ])  # fmt: skip


def _kept(words: Sequence[str]) -> list[str]:
    """Return the words that the job itself takes: without what was for sbatch, and without those added anew."""
    return [word for word in words if not re.match(r"\+{0,2}(slurm(\.[a-z_]+)?|run_dir|trainer\.accelerator)=", word)]


def _header_quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if re.search(r"[ #]", value) else option


def _hydra_quoted(text: str) -> str:
    """Return text as a value of Hydra's command line; it holds no quotes.

    >>> _hydra_quoted("/runs/mine"), _hydra_quoted("/my runs/a,b")
    ('/runs/mine', "'/my runs/a,b'")
    """
    return text if re.fullmatch(r"[\w./-]+", text) else f"'{text}'"
