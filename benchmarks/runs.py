"""The protocol: pairs, import baselines, parity in float32, then rounds in which every arm runs once."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.arms import IMPORTS, command, environment, program_of, read_memory, read_steps
from benchmarks.records import Record, Run, Step
from benchmarks.workloads import LIVE, SHIPPED, Workload

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = Path("runs", "benchmark")  # caches, rows, logs and run folders: under what git ignores
PARITY = 0  # stands for a round's number
PARITY_STEPS, PARITY_PAIRS = 3, 4
PARITY_BOUNDS = {"loss": 1e-4, "grad_norm": 1e-2, "chosen": 1e-2, "rejected": 1e-2}
TAIL = 20  # lines of a failed process' output that are shown


class BenchmarkError(Exception):
    """The benchmark cannot go on, or its figures would mean nothing; the text says why."""


@dataclass(frozen=True)
class Child:
    """What a process that has ended took."""

    peak_rss: int
    seconds: float


def run_child(words: Sequence[str], env: dict[str, str], log: Path) -> Child:
    """Run a process to its end, its output into `log`; raise BenchmarkError with the output's end if it fails.

    The maximum resident set is the kernel's own count for this child. A child inherits the count of its parent,
    which is why nothing heavy is imported here.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(words, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        raise BenchmarkError(f"exit code {process.returncode}, output in {log}:\n{last}")
    return Child(usage.ru_maxrss * 1024, time.perf_counter() - start)


class Bench:
    """One benchmark of one workload; `record` grows and is saved after every process."""

    def __init__(self, record: Record, file: Path, data: str):
        self.record, self.file, self.data = record, file, data
        self.workload = record.workload
        self.folder = SCRATCH / self.workload.name
        self.rows = self.folder / "pairs.jsonl"
        self.model = ""

    def run(self) -> None:
        """Do all that has not been done."""
        self._prepare()
        self._baselines()
        if not self.record.parity and {program_of(arm) for arm in self.workload.arms} == {"trl", "ours"}:
            self._parity()
        for number, arm in self.record.missing():
            run = self._train(self.workload, arm, number)
            self.record.runs.append(run)
            self.record.save(self.file)
            seconds = [step.seconds for step in run.steps[self.workload.warmup :]]
            print(
                f"{self.workload.name}: round {number}, {arm}: {sum(seconds) / len(seconds):.2f} s a step, "
                f"{run.peak_rss / 1e9:.2f} GB, load before {run.load:.2f}",
                flush=True,
            )

    def _child(self, name: str, words: Sequence[str], arm: str = "") -> Child:
        return run_child(
            words, environment(arm, SCRATCH, os.environ, self.workload.device), SCRATCH / "logs" / f"{name}.log"
        )

    def _prepare(self) -> None:
        """Write the rows; the model is converted on the way, so that no arm's memory contains that."""
        out = self.folder / "pairs.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.record.runs:  # what an earlier benchmark has computed would be a gift to round 1
            for cache in ("reference", "data", "datasets"):
                shutil.rmtree(SCRATCH / "cache" / cache, ignore_errors=True)
        job = {
            "path": self.data, "rows": str(self.rows), "out": str(out), "max_length": self.workload.max_length,
            "words": self.workload.model,
            "wanted": max(self.workload.all_steps * self.workload.pairs, PARITY_STEPS * PARITY_PAIRS),
        }  # fmt: skip
        self._child(f"{self.workload.name}-pairs", [sys.executable, "-m", "benchmarks.pairs", json.dumps(job)])
        found = json.loads(out.read_text())
        self.model = found["model"]
        if self.record.pairs and self.record.pairs != found["pairs"]:
            raise BenchmarkError(f"{self.file}: begun with other pairs than {self.data} gives; start anew")
        self.record.pairs = found["pairs"]

    def _baselines(self) -> None:
        for program in {program_of(arm): None for arm in self.workload.arms}:
            if program not in self.record.baselines:
                words = [sys.executable, "-c", IMPORTS[program]]
                self.record.baselines[program] = peak = self._child(f"imports-{program}", words).peak_rss
                if peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024:
                    raise BenchmarkError("this process is larger than its children: their memory cannot be told")

    def _parity(self) -> None:
        """Raise BenchmarkError unless both programs compute the same on the same tokens in float32."""
        pairs = min(PARITY_PAIRS, self.workload.pairs)
        small = replace(self.workload, warmup=0, steps=PARITY_STEPS, pairs=pairs, precision="32")
        theirs, ours = (self._train(small, arm, PARITY).steps for arm in (SHIPPED, LIVE))
        self.record.parity = compare(theirs, ours)
        self.record.save(self.file)
        print(f"{self.workload.name}: float32 parity, largest differences: {self.record.parity}", flush=True)

    def _train(self, workload: Workload, arm: str, number: int) -> Run:
        name = f"{'parity' if number == PARITY else number}-{arm}"
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        load = os.getloadavg()[0]
        words = command(workload, arm, self.rows, run_dir, self.model)
        child = self._child(f"{workload.name}-{name}", words, arm)
        steps, peak_device = read_steps(arm, run_dir, workload.pairs), read_memory(arm, run_dir)
        if len(steps) != workload.all_steps:
            raise BenchmarkError(f"{arm}: {len(steps)} steps instead of {workload.all_steps}; see {run_dir}")
        if program_of(arm) == "trl":
            self._same_tokens(arm, json.loads((run_dir / "trl.json").read_text())["digest"])
        shutil.rmtree(run_dir)  # an exported model is half a gigabyte
        return Run(arm, number, steps, child.peak_rss, child.seconds, load, peak_device)

    def _same_tokens(self, arm: str, digest: str) -> None:
        if digest != self.record.pairs["digest"]:
            raise BenchmarkError(f"{arm}: TRL made other tokens of {self.rows} than we do: nothing can be compared")


def compare(theirs: Sequence[Step], ours: Sequence[Step]) -> dict[str, float]:
    """Return the largest difference in each of a step's figures; raise BenchmarkError if one is out of its bound."""
    gaps = {
        key: [abs(getattr(a, key) - getattr(b, key)) for a, b in zip(theirs, ours, strict=True)]
        for key in PARITY_BOUNDS
    }
    found = {key: math.nan if any(map(math.isnan, values)) else max(values) for key, values in gaps.items()}
    wrong = [f"{key} differs by {found[key]:.3g}, allowed {bound:g}" for key, bound in PARITY_BOUNDS.items()
             if not found[key] <= bound]  # fmt: skip
    if wrong:
        raise BenchmarkError(f"float32: the programs do not compute the same: {'; '.join(wrong)}")
    return found
