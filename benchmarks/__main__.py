"""Run benchmarks or print a recorded one: `python -m benchmarks --help`, from the repository's root."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, table
from benchmarks.arms import program_of
from benchmarks.counts import positive, whole
from benchmarks.records import UNREADABLE, Record, load, new_file, unfinished
from benchmarks.runs import ROOT, Bench, BenchmarkError
from benchmarks.workloads import ARMS, COMPACT, DATA, WORKLOADS, Workload

RESULTS = ROOT / "benchmarks" / "results"
SLOW = (
    "warning: this processor has no bfloat16 instructions: a step may take minutes; "
    "--precision 32 compares both programs in float32"
)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parse.add_argument("workload", nargs="*", help=f"some of {', '.join(WORKLOADS)}; all, if none is named")
    parse.add_argument("--rounds", type=positive, default=3, help="how often every arm runs (default: 3)")
    parse.add_argument("--arms", help=f"some of {','.join(ARMS)}, separated by commas")
    parse.add_argument("--warmup", type=whole, help="steps that are dropped")
    parse.add_argument("--steps", type=positive, help="steps that are timed")
    parse.add_argument("--pairs", type=positive, help="pairs a step")
    parse.add_argument("--device", choices=("cpu", "cuda"), help="what both programs train on (default: cpu)")
    parse.add_argument("--precision", choices=("bf16", "32"), help="what both programs compute in (default: bf16)")
    parse.add_argument(
        "--model", type=words_of, metavar="WORDS", help='such as "model=llama32_1b" (default: model=smollm2)'
    )
    parse.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    parse.add_argument(
        "--resume", action="store_true", help="go on with a benchmark of the same commit that was cut off"
    )
    parse.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a recorded benchmark, run nothing"
    )
    for name, path in DATA.items():
        parse.add_argument(f"--{name}", default=path, metavar="FILE", help=f"preference pairs (default: {path})")
    return parse


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of one argument."""
    return tuple(shlex.split(text))


def chosen(options: argparse.Namespace) -> list[Workload]:
    """Return the workloads as the options want them."""
    keys = ("warmup", "steps", "pairs", "device", "precision", "model")
    changes = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if options.arms:
        changes["arms"] = tuple(dict.fromkeys(_known(name, ARMS) for name in options.arms.split(",")))
    found = [WORKLOADS[_known(name, WORKLOADS)] for name in dict.fromkeys(options.workload or WORKLOADS)]
    without = {COMPACT} if options.device == "cuda" else set()  # TRL's compact head is always on there
    return [replace(one, **{"arms": tuple(a for a in one.arms if a not in without), **changes}) for one in found]


def _known(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise BenchmarkError(f"there is no {name}; there are {', '.join(names)}")
    return name


def warn(workloads: Iterable[Workload]) -> None:
    """Say beforehand what would otherwise be learnt from hours of waiting."""
    if any((one.device, one.precision) == ("cpu", "bf16") for one in workloads) and machine.lacks_bfloat16():
        print(SLOW, file=sys.stderr)


def recorded(file: Path) -> Record:
    """Return a recorded benchmark; raise BenchmarkError where the file holds none."""
    try:
        return load(file)
    except UNREADABLE as error:
        raise BenchmarkError(f"--table {file}: no record of a benchmark ({error})") from error


def judge(workloads: Iterable[Workload], options: argparse.Namespace) -> None:
    """Raise BenchmarkError for what any of the benchmarks lacks: before the hours that the first of them takes."""
    versions = machine.versions()
    for workload in workloads:
        if versions["trl"] == "none" and "trl" in map(program_of, workload.arms):
            raise BenchmarkError("TRL is not installed: `make bench` installs it, or pip install '.[bench]'")
        if not (ROOT / getattr(options, workload.data)).is_file():
            file = getattr(options, workload.data)
            raise BenchmarkError(f"no file {file}: give preference pairs with --{workload.data} FILE")
    if options.resume and not machine.is_clear(told := versions["dpo_lightning"]):
        raise BenchmarkError(
            f"--resume: commit {told}: what was cut off may be of other code; commit it, or start anew"
        )


def bench(workload: Workload, options: argparse.Namespace) -> None:
    """Run one benchmark, print its table and write it beside the record."""
    fresh = Record(
        workload, options.rounds, time.strftime("%Y-%m-%d %H:%M"), machine.describe(workload.device), machine.versions()
    )
    try:
        file = unfinished(options.out, fresh) if options.resume else None
        record = load(file) if file else fresh
        file = file or new_file(options.out, record)
        record.save(file)  # a folder that takes no file is to be known before hours of runs
    except OSError as error:
        raise BenchmarkError(f"--out {options.out}: no record can be written there ({error})") from error
    Bench(record, file, getattr(options, workload.data)).run()
    text = table.write(record)
    file.with_suffix(".md").write_text(text)
    print(text)


def main(words: Sequence[str]) -> int:
    """Enter from the command line; return the exit code."""
    options = parser().parse_args(words)
    try:
        if options.table:
            print(table.write(recorded(options.table)))
            return 0
        workloads = chosen(options)
        judge(workloads, options)
        warn(workloads)
        for workload in workloads:
            bench(workload, options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
