"""The protocol, with children that only leave what real ones would."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks import cost, machine, runs
from benchmarks.__main__ import main
from benchmarks.records import Record, load
from benchmarks.workloads import LIVE, SHIPPED, WORKLOADS
from dpo_lightning.model.tiny import byte_tokenizer

WORKLOAD = replace(WORKLOADS["hh-lora"], arms=(SHIPPED, LIVE), warmup=1, steps=2)


class Children:
    """Stands in for `run_child`; `started` tells which processes ran, `loss` what each program computes."""

    def __init__(self, file: Path):
        self.file, self.started, self.saved = file, [], []
        self.loss = {"trl": 0.5, "ours": 0.5}
        self.digest, self.lost_steps = "d", 0
        self.in_float32 = set()

    def __call__(self, words: list[str], env: dict[str, str], log: Path) -> runs.Child:
        self.started.append(log.stem.removeprefix("hh-lora-"))
        self.saved.append(len(load(self.file).runs) if self.file.exists() else 0)
        if "benchmarks.pairs" in words:
            self.write_pairs(json.loads(words[-1]))
        elif "benchmarks.trl_arm" in words:
            job = json.loads(words[-1])
            self.note(job["config"].get("bf16") is False)
            step = {"seconds": 4.0, "loss": self.loss["trl"], "grad_norm": 1.0, "chosen": -9.0, "rejected": -8.0}
            steps = [step] * (job["config"]["max_steps"] - self.lost_steps)
            Path(job["out"]).write_text(json.dumps({"steps": steps, "digest": self.digest}))
        elif "dpo_lightning" in words:
            told = dict(word.split("=", 1) for word in words[3:])
            self.note(told["trainer.precision"] == "32-true")
            logps = {"train/logps/chosen": -9.0, "train/logps/rejected": -8.0}
            row = {"train/loss": self.loss["ours"], "train/grad_norm": 1.0, "perf/pairs_per_second": 8.0, **logps}
            Path(told["run_dir"], "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * int(told["trainer.max_steps"]))
        return runs.Child(10**12, 9.0)

    def note(self, float32: bool) -> None:
        if float32:
            self.in_float32.add(self.started[-1])

    def write_pairs(self, job: dict[str, Any]) -> None:
        pairs = {"file": "x", "distinct": 24, "left_out": 0, "lengths": [[9, 1, 1]] * job["wanted"], "digest": "d"}
        Path(job["out"]).write_text(json.dumps({"model": "m", "pairs": pairs}))


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children(tmp_path / "record.json")
    monkeypatch.setattr(runs, "run_child", made)
    monkeypatch.setattr(runs, "SCRATCH", tmp_path / "scratch")
    return made


def bench(children: Children, record: Record | None = None) -> Record:
    fresh = record or Record(WORKLOAD, 2, "2026-01-02 03:04", {}, {})
    runs.Bench(fresh, children.file, "data.jsonl").run()
    return fresh


def test_parity_first_then_rounds_in_which_the_arms_take_turns_each_saved_at_once(children: Children):
    record = bench(children)
    trained = [f"{number}-{arm}" for number in (1, 2) for arm in (SHIPPED, LIVE)]
    before = ["pairs", "imports-trl", "imports-ours", f"parity-{SHIPPED}", f"parity-{LIVE}"]
    assert children.started == [*before, *trained]
    assert children.in_float32 == {*before[3:]}
    assert children.saved[-4:] == [0, 1, 2, 3]
    assert load(children.file) == record
    assert record.parity == {"loss": 0, "grad_norm": 0, "chosen": 0, "rejected": 0}
    assert [[step.seconds for step in run.steps] for run in record.runs] == [[4.0] * 3, [1.0] * 3] * 2
    assert len(record.pairs["lengths"]) == 3 * 8


def test_in_float32_every_round_is_as_exact_as_parity(children: Children):
    bench(children, Record(replace(WORKLOAD, precision="32"), 1, "2026-01-02 03:04", {}, {}))
    assert children.in_float32 == {f"{turn}-{arm}" for turn in ("parity", 1) for arm in (SHIPPED, LIVE)}
    assert load(children.file).workload.precision == "32"


def test_a_benchmark_that_was_cut_off_does_only_what_is_missing(children: Children):
    record = bench(children)
    record.runs = record.runs[:-1]
    children.started.clear()
    bench(children, record)
    assert children.started == ["pairs", f"2-{LIVE}"]
    assert not record.missing()


def test_programs_that_compute_different_losses_are_not_timed(children: Children):
    children.loss["ours"] = 0.5002
    with pytest.raises(runs.BenchmarkError, match=r"do not compute the same: loss differs by 0\.0002"):
        bench(children)
    assert children.started[-1] == f"parity-{LIVE}"


def test_different_tokens_and_lost_steps_stop_it(children: Children):
    children.digest = "other"
    with pytest.raises(runs.BenchmarkError, match="TRL made other tokens"):
        bench(children)
    children.digest, children.lost_steps = "d", 1
    with pytest.raises(runs.BenchmarkError, match="trl-shipped: 2 steps instead of 3"):
        bench(children)


def test_other_pairs_do_not_go_on_in_an_old_record(children: Children):
    record = bench(children)
    record.pairs["digest"] = "older"
    with pytest.raises(runs.BenchmarkError, match="begun with other pairs"):
        bench(children, record)


def test_a_parent_larger_than_its_children_is_noticed(children: Children, monkeypatch):
    monkeypatch.setattr(runs, "run_child", lambda *words: (children(*words), runs.Child(1, 1.0))[1])
    with pytest.raises(runs.BenchmarkError, match="larger than its children"):
        bench(children)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: dict.fromkeys(["dpo_lightning", *machine.PACKAGES], "1"))
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda: False)


WORDS = [
    "hh-lora",
    "--hh",
    "README.md",
    "--rounds",
    "1",
    "--warmup",
    "1",
    "--steps",
    "2",
    "--arms",
    f"{SHIPPED},{LIVE}",
]


@pytest.mark.usefixtures("known")
def test_results_that_cannot_be_written_are_told_before_anything_runs(children: Children, tmp_path: Path, capsys):
    out = tmp_path / "file"
    out.touch()
    assert main([*WORDS, "--out", str(out)]) == 2
    assert children.started == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {out}: no record can be written there ([Errno ") and error.count("\n") == 1


def failing(*_: object) -> runs.Child:
    raise runs.BenchmarkError("no model")


@pytest.mark.usefixtures("known")
def test_the_empty_record_of_one_that_failed_at_once_is_gone_on_with(children: Children, tmp_path: Path, capsys):
    words, out = [*WORDS, "--out", str(tmp_path / "out")], tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_child", failing)
        assert main(words) == 2
    (file,) = out.iterdir()
    assert load(file).missing() == [(1, SHIPPED), (1, LIVE)]
    assert main(["--table", str(file)]) == 0
    assert "2 of 2 runs are missing" in capsys.readouterr().out
    assert main([*words, "--resume"]) == 0
    assert {*out.iterdir()} == {file, file.with_suffix(".md")}
    assert not load(file).missing()


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where `benchmarks.cost` works here; its children fail."""
    monkeypatch.setattr(cost, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(cost, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(cost, "run_child", failing)
    return tmp_path


def test_wrong_counts_and_failed_children_of_the_cost_are_told_without_a_traceback(costs: Path, capsys):
    for count in ("-5", "0"):
        with pytest.raises(SystemExit, match="2"):
            cost.main([count])
        assert f"invalid positive value: '{count}'" in capsys.readouterr().err
    assert cost.main(["3"]) == 2
    assert capsys.readouterr().err == "error: no model\n"
    assert not [*costs.rglob("*.jsonl")]


def test_rows_of_the_cost_are_all_there_or_not_at_all(costs: Path, monkeypatch):
    file = costs / "rows.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cost, "json", SimpleNamespace(dumps=Mock(side_effect=["{}", KeyboardInterrupt])))
        cost.write_rows(file, 3)
    assert not file.exists()
    cost.write_rows(file, 3)
    assert len(file.read_text().splitlines()) == 3


def test_the_cost_of_another_number_of_pairs_is_not_told(costs: Path, monkeypatch):
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(costs / "cache"))
    cost.rows_of(3).parent.mkdir(parents=True)
    cost.write_rows(cost.rows_of(3), 2)
    with pytest.raises(AssertionError, match="has 2 usable pairs"):
        cost._do("tokenise", 3, SimpleNamespace(load_tokenizer=byte_tokenizer), None)


def test_the_cost_is_of_a_cold_cache_each_time_and_keeps_earlier_records(costs: Path, monkeypatch):
    warm = []

    def child(words: list[str], env: dict[str, str], log: Path) -> None:
        made = [Path(env["DPO_LIGHTNING_CACHE"], "data"), Path(env["HF_DATASETS_CACHE"])]
        if "--stage" in words:
            warm.append((words[-2], [folder.exists() for folder in made]))
            for folder in made:
                folder.mkdir(parents=True, exist_ok=True)
            log.parent.mkdir(exist_ok=True)
            log.write_text(json.dumps({"seconds": 1.0, "own": 2.0, "mapped": 3.0}))

    monkeypatch.setattr(cost, "run_child", child)
    monkeypatch.setattr(cost.time, "strftime", lambda form: "2026-01-02")
    assert cost.main(["3", "4"]) == cost.main(["3"]) == 0
    assert warm == [("tokenise", [False] * 2), ("cache", [True] * 2), ("open", [True] * 2)] * 3
    first, second = (costs / "benchmarks" / "results" / f"2026-01-02-cost{number}.md" for number in ("", "-2"))
    assert "| 4 |" in first.read_text() and "| 4 |" not in second.read_text()
