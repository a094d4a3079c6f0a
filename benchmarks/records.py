"""What a benchmark has measured so far, as one JSON file that is written anew after every process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload

# What `load` raises of a file that is no record.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Step:
    """One optimizer step, its log-probabilities as means over its pairs; mfu where the program tells it."""

    seconds: float
    loss: float
    grad_norm: float
    chosen: float
    rejected: float
    mfu: float | None = None


@dataclass(frozen=True)
class Run:
    """One process that trained: all of its steps, its largest resident set in bytes, the machine's load before it.

    peak_device: the most bytes of its tensors on a CUDA device; None on the CPU.
    """

    arm: str
    round: int
    steps: list[Step]
    peak_rss: int
    wall_seconds: float
    load: float
    peak_device: int | None = None


@dataclass
class Record:
    """A benchmark of one workload.

    pairs: what `pairs.write_pairs` returns. baselines: bytes of a process that only imported trl, ours. parity: the
    largest differences of the float32 stage.
    """

    workload: Workload
    rounds: int
    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    pairs: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, int] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def missing(self) -> list[tuple[int, str]]:
        """Return round and arm of the processes that have not run yet, in the order in which they are to run."""
        done = {(run.round, run.arm) for run in self.runs}
        wanted = [(number, arm) for number in range(1, self.rounds + 1) for arm in self.workload.arms]
        return [entry for entry in wanted if entry not in done]

    def save(self, file: Path) -> None:
        """Write the file, a run a line, by one rename, so that a kill leaves the last whole one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = asdict(self)
        runs = ",\n  ".join(json.dumps(run) for run in raw.pop("runs"))
        lines = [f'"{key}": {json.dumps(value)}' for key, value in raw.items()]
        scratch = file.with_suffix(".part")
        scratch.write_text("{\n" + ",\n".join([*lines, f'"runs": [\n  {runs}\n]']) + "\n}\n")
        scratch.replace(file)


def load(file: Path) -> Record:
    """Read a record."""
    raw = json.loads(file.read_text())
    lists = {key: tuple(value) for key, value in raw["workload"].items() if isinstance(value, list)}
    workload = Workload(**raw["workload"] | lists)
    runs = [Run(**run | {"steps": [Step(**step) for step in run["steps"]]}) for run in raw["runs"]]
    return Record(**raw | {"workload": workload, "runs": runs})


def unfinished(folder: Path, like: Record) -> Path | None:
    """Return the newest file of a benchmark like this one, of the same code, that was cut off."""
    for file in sorted(folder.glob(f"*-{like.workload.name}*.json"), reverse=True):
        try:
            there = load(file)
        except UNREADABLE:
            continue
        same = (there.workload, there.rounds, there.versions, there.machine)
        if same == (like.workload, like.rounds, like.versions, like.machine) and there.missing():
            return file
    return None


def new_file(folder: Path, record: Record) -> Path:
    """Return a free file name: date, workload, cuda and float32 if so, and a number where a day has several."""
    workload = record.workload
    kind = ("-cuda" if workload.device == "cuda" else "") + ("-float32" if workload.precision == "32" else "")
    return free(folder, f"{record.started[:10]}-{workload.name}{kind}", ".json")


def free(folder: Path, stem: str, suffix: str) -> Path:
    """Return a file that is not there yet: the stem, or the stem and a number."""
    names = (folder / f"{stem}{number}{suffix}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(file for file in names if not file.exists())
