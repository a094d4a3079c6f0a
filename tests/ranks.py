"""Real ranks for tests: processes that talk over gloo, each of which runs several command lines one after the other."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.nursery import nursery

ROOT = Path(__file__).resolve().parent.parent
# The smallest run: seconds, and the same bits each time.
TINY = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true",
    "trainer.accelerator=cpu", "data.max_pairs=40", "data.max_length=160",
]  # fmt: skip


def own_part(p: Any, rank: int) -> torch.Tensor:
    """Return a rank's part of a weight: all of it, or its ZeRO-3 shard without what pads the last one."""
    if not hasattr(p, "ds_tensor"):
        return p.detach()
    return p.ds_tensor.detach()[: max(0, p.ds_numel - rank * p.ds_tensor.ds_numel)]


class Trace(pl.Callback):
    """Appends a line for each step and rank: pairs, and loss, norm, rate, random state and weights to the bit."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.ids: list[int] = []
        self.step = 0

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module, outputs, batch, batch_idx):
        self.ids += batch.rows_B.tolist() if batch.counted else []
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        logged = next(c.latest for c in trainer.callbacks if hasattr(c, "latest"))
        exact = {key: float(logged.get(f"train/{key}", "nan")).hex() for key in ("loss", "grad_norm", "lr")}
        weights = hashlib.sha256()
        for p in pl_module.parameters():
            if p.requires_grad:
                weights.update(own_part(p, trainer.global_rank).flatten().view(torch.uint8).cpu().numpy().tobytes())
        line = {
            "step": self.step, "epoch": trainer.current_epoch, "ids": self.ids, **exact, "weights": weights.hexdigest(),
            "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        }  # fmt: skip
        self.ids = []
        with (self.folder / f"trace-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def traced(run_dir: Path, *words: str) -> list[str]:
    """Return the words of a run in `run_dir` that leaves a trace there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return [
        *words, f"run_dir={run_dir}", "+callbacks.trace._target_=tests.ranks.Trace",
        f"+callbacks.trace.folder={run_dir}", "trusted_targets=[tests.ranks.Trace]",
    ]  # fmt: skip


def trace(run_dir: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    """Return a rank's trace by step; what a killed run had traced and a later one has traced anew is replaced."""
    rows = [json.loads(line) for line in (run_dir / f"trace-{rank}.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return what a run has logged, without what depends on the clock."""
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in logged]


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection is given before its listener comes, either."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)  # below those that systems give to connections
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Return the environment of a rank: one thread, so that bits can be compared, and DeepSpeed's op built once."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("DPO_LIGHTNING_RUN_DIR", "LOCAL_RANK")}
    return {
        **inherited, "DPO_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "offline", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), **more,
    }  # fmt: skip


def environments(env: Mapping[str, str], world: int, nodes: int = 1) -> list[dict[str, str]]:
    """Return each rank's environment, as launchers on `nodes` nodes would set it."""
    shared = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [
        {**shared, "NODE_RANK": str(rank * nodes // world), "LOCAL_RANK": str(rank % (world // nodes))}
        for rank in range(world)
    ]


def start(command: Sequence[str], world: int, env: Mapping[str, str], nodes: int = 1) -> list[subprocess.Popen[str]]:
    """Start a process for each rank, as launchers on `nodes` nodes would."""
    return [
        subprocess.Popen(
            command, text=True, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for own in environments(env, world, nodes)
    ]  # fmt: skip


def finished(processes: Sequence[subprocess.Popen[str]], timeout: float = 280) -> list[tuple[int, str]]:
    """Wait for the ranks; return exit code and output of each. None outlives the wait."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run_ranks(
    runs: Sequence[Sequence[str]], cache: Path, world: int = 2, code: int | Sequence[int] = 0, **more: str
) -> list[str]:
    """Run command lines one after the other, each on all ranks; return what each rank printed.

    {rank} in a word becomes the rank's number; a word env:NAME=VALUE is set in the environment of its run alone.
    Any exit code but `code`, of all runs or of each, fails the test, with the output. The ranks are forked; on GPUs,
    which do not outlive a fork, they are started.
    """
    env = environment(cache, **more)
    if env["DS_ACCELERATOR"] == "cpu":
        done = nursery().run(runs, environments(env, world))
    else:
        done = finished(start([sys.executable, __file__, json.dumps(runs)], world, env))
    for ended, output in done:
        assert ended == 0, output
        expected = [code] * len(runs) if isinstance(code, int) else list(code)
        assert json.loads(output.splitlines()[-1]) == expected, output
    return [output for _, output in done]


def fault(text: str) -> list[str]:
    """Return the words that let a fault happen in a run."""
    return [f"env:DPO_LIGHTNING_FAULT={text}", "env:DPO_LIGHTNING_ALLOW_FAULTS=1"]


def main(runs: list[list[str]]) -> list[int]:
    """Be one rank."""
    from hydra.core.global_hydra import GlobalHydra

    from dpo_lightning import finish
    from dpo_lightning.__main__ import main as cli
    from dpo_lightning.cluster import points

    finish.write_report = lambda run_dir: run_dir / "report.html"  # half of such a short run's time
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may be under nohup, which turns it off
    codes = []
    for words in runs:
        GlobalHydra.instance().clear()
        points._met.clear()
        own = [word.replace("{rank}", os.environ["LOCAL_RANK"]) for word in words]
        before = dict(os.environ)
        os.environ |= dict(word.removeprefix("env:").split("=", 1) for word in own if word.startswith("env:"))
        sys.argv = ["dpo_lightning", *(word for word in own if not word.startswith("env:"))]
        try:
            cli()
        except SystemExit as done:
            codes.append(int(done.code or 0))
        except Exception:
            traceback.print_exc()
            codes.append(1)
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ |= before
    return codes


def tell(runs: list[list[str]]) -> int:
    """Be one rank, whose last line tells the exit codes of its runs."""
    print("\n" + json.dumps(main(runs)), flush=True)
    return 0


if __name__ == "__main__":
    tell(json.loads(sys.argv[1]))
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it
