"""Figures from handmade runs: every ratio, median and verdict below is worked out by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import machine, table
from benchmarks.__main__ import chosen, main, parser
from benchmarks.records import Record, Run, Step, load, new_file, unfinished
from benchmarks.runs import ROOT, BenchmarkError, compare
from benchmarks.workloads import ARMS, CACHED, CHECKPOINTED, LIVE, SHIPPED, TARGETS, TUNED, WORKLOADS, Target, Workload

MB = 10**6
WORKLOAD = Workload("hh-lora", "hh", lora=True, lr=1e-4, arms=(SHIPPED, LIVE), warmup=1, steps=2, pairs=2)


def run(arm: str, number: int, seconds: list[float], rss: int = 500 * MB, mfu: float | None = None) -> Run:
    return Run(arm, number, [Step(s, 0.5, 1.0, -9.0, -9.0, mfu) for s in seconds], rss, 100.0, 0.1)


def record(*runs: Run, workload: Workload = WORKLOAD, rounds: int = 3) -> Record:
    versions: dict[str, str] = dict.fromkeys(["dpo_lightning", "torch", "transformers", "peft", "trl"], "1")
    machine = {"processor": "P", "cores": 2, "threads": 2, "memory_gb": 24}
    lengths = [[10, 5, 5]] * 6  # 30 tokens a pair without padding, 60 a step
    pairs = {"file": "x", "distinct": 3, "left_out": 1, "lengths": lengths, "digest": "d"}
    baselines = {"trl": 100 * MB, "ours": 200 * MB}
    return Record(workload, rounds, "2026-01-02 03:04", machine, versions, pairs, baselines, {"loss": 1e-6}, [*runs])


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


SPEED = Target("speed", "seconds", SHIPPED, LIVE, must=5, aim=8)
MEMORY = Target("memory", "memory", CHECKPOINTED, SHIPPED, must=0.35, aim=0.2)


def test_ratio_is_of_the_timed_steps_of_one_round_and_the_median_of_the_rounds():
    runs = [
        run(SHIPPED, 1, [99, 30, 10]), run(LIVE, 1, [1, 4, 4]),  # 40 / 8
        run(SHIPPED, 2, [99, 30, 60]), run(LIVE, 2, [50, 5, 10]),  # 90 / 15
        run(SHIPPED, 3, [99, 18, 18]), run(LIVE, 3, [50, 1, 2]),  # 36 / 3
    ]  # fmt: skip
    assert table.measured(SPEED, record(*runs)) == table.Spread(6, 5, 12, 3)


def test_a_round_that_one_of_the_two_arms_lacks_does_not_count():
    runs = [run(SHIPPED, 1, [1, 6, 6]), run(LIVE, 1, [1, 1, 1]), run(SHIPPED, 2, [1, 50, 50])]
    assert table.measured(SPEED, record(*runs)) == table.Spread(6, 6, 6, 1)
    assert table.measured(SPEED, record(runs[2])) is None


def test_memory_is_above_each_programs_own_imports():
    runs = [run(SHIPPED, 1, [1, 1, 1], 900 * MB), run(CHECKPOINTED, 1, [1, 1, 1], 400 * MB)]
    found = table.measured(MEMORY, record(*runs))
    assert found is not None
    assert found.median == pytest.approx((400 - 200) / (900 - 100))


def test_mfu_is_over_the_whole_time_of_the_timed_steps():
    target = Target("mfu", "mfu", LIVE)
    steps = [Step(seconds, 0.5, 1, -9, -9, mfu) for seconds, mfu in ((1, 0.9), (1, 0.8), (3, 0.4))]
    found = table.measured(target, record(replace(run(LIVE, 1, []), steps=steps)))
    assert found is not None
    assert found.median == pytest.approx((1 * 0.8 + 3 * 0.4) / 4)
    assert table.measured(target, record(run(LIVE, 1, [1, 1, 1]))) is None


@pytest.mark.parametrize(
    ("target", "median", "word"),
    [
        (SPEED, 8.0, "aim met"), (SPEED, 7.9, "met"), (SPEED, 5.0, "met"), (SPEED, 4.99, "**missed**"),
        (MEMORY, 0.2, "aim met"), (MEMORY, 0.21, "met"), (MEMORY, 0.35, "met"), (MEMORY, 0.36, "**missed**"),
        (Target("no limits", "seconds", SHIPPED, LIVE), 1.0, ""),
    ],
)  # fmt: skip
def test_verdict(target, median, word):
    assert table.verdict(target, table.Spread(median, 0, 99, 3)) == word
    assert table.verdict(target, None) == "not run"


def test_steady_compares_costs_of_a_token():
    runs = record(run(LIVE, 1, [12, 6, 6]))
    assert table.steady(runs.runs[0], runs) == pytest.approx(2)
    runs.pairs["lengths"] = [[10, 40, 40], [10, 40, 40], *[[10, 5, 5]] * 4]  # the first step has 200 tokens
    assert table.steady(runs.runs[0], runs) == pytest.approx((12 / 200) / (6 / 60))


def test_on_cuda_the_devices_memory_counts_and_a_cpus_limits_do_not():
    on_gpu = replace(WORKLOAD, device="cuda", arms=(SHIPPED, TUNED, CACHED))
    runs = [replace(run(arm, 1, [1, 1, 1]), peak_device=peak * MB) for arm, peak in ((TUNED, 800), (CACHED, 200))]
    told = record(*runs, workload=on_gpu)
    told.machine["accelerator"] = "G"
    text = table.write(told)
    memory = "memory at full speed, of tuned"
    assert cells(text, memory) == [memory, "0.25x", "0.25x to 0.25x", "", "", ""]
    assert cells(text, CACHED)[2] == "0.20 (0.20 to 0.20)"
    assert "One G;" in text and LIVE not in text


def test_in_float32_the_report_says_so_and_judges_nothing():
    exact = replace(WORKLOADS["hh-lora"], precision="32", warmup=1, steps=2, pairs=2)
    text = table.write(record(*(run(arm, 1, [9, 30, 10], mfu=0.5) for arm in exact.arms), workload=exact))
    assert text.startswith("# hh-lora in float32: ")
    assert "2 pairs a step in file order, float32;" in text
    assert [line for line in text.splitlines() if "bfloat16" in line] == [
        "No targets: those of this workload are for bfloat16.",
        f"- `{SHIPPED}`: TRL's defaults, bfloat16 off: reference in the run, activations recomputed.",
    ]
    speed, share = (target.label.replace("bfloat16", "float32") for target in (TARGETS["hh-lora"][i] for i in (0, -1)))
    assert share == "share of the float32 GEMM peak, reference cached (`perf/mfu`)"
    assert cells(text, speed) == [speed, "1x", "1x to 1x"]
    assert cells(text, share) == [share, "50%", "50% to 50%"]
    assert "| | median | spread |\n|---|---|---|\n" in text
    assert {(t.must, t.aim) for t in table.targets_of(exact)} == {(None, None)}
    assert "must" not in table.write(record(workload=exact)) and "not run" not in table.write(record(workload=exact))


def test_report_has_ratios_and_arms():
    text = table.write(record(run(SHIPPED, 1, [9, 30, 10], 1100 * MB), run(LIVE, 1, [4, 4, 4], 700 * MB)))
    speed = "speed against shipped, both paying for the reference"
    assert cells(text, speed) == [speed, "5x", "5x to 5x", "5x", "8x", "met"]
    assert cells(text, LIVE)[1:4] == ["0.500 (0.500 to 0.500)", "0.50 (0.50 to 0.50)", "0.70 (0.70 to 0.70)"]
    assert cells(text, LIVE)[4:6] == ["1 + 2", "1.00 (1.00 to 1.00)"]
    assert cells(text, LIVE)[6] == "88"  # 100 s of process, 12 s of steps
    assert "4 of 6 runs are missing" in text
    assert "gone through 2 times" in text


def test_targets_are_the_issues_and_name_arms_that_run():
    for name, targets in TARGETS.items():
        for target in targets:
            assert {target.over, target.under or target.over} <= {*WORKLOADS[name].arms} <= {*ARMS}
            if target.must is not None and target.aim is not None:
                assert (target.aim > target.must) == target.more_is_better
    limits = {(t.over, t.under, t.measure): (t.must, t.aim) for t in TARGETS["hh-lora"]}
    assert limits[SHIPPED, LIVE, "seconds"] == (5, 8)
    assert limits[TUNED, CACHED, "seconds"] == (4, 7)
    assert limits[CACHED, TUNED, "memory"] == (0.4, 0.25)
    assert limits[CACHED, None, "mfu"] == (0.5, 0.75)


def test_a_record_comes_back_as_it_was_saved_and_its_table_is_printed(tmp_path: Path, capsys):
    file = tmp_path / "deep" / "r.json"
    kept = record(run(SHIPPED, 1, [1, 2, 3], mfu=0.5), run(LIVE, 1, [1, 1, 1]))
    kept.save(file)
    assert load(file) == kept
    assert [entry.name for entry in file.parent.iterdir()] == ["r.json"]
    assert main(["--table", str(file)]) == 0
    assert capsys.readouterr().out.strip() == table.write(kept).strip()


def test_a_record_from_before_there_was_a_choice_is_in_bfloat16(tmp_path: Path):
    kept, file = record(run(SHIPPED, 1, [1, 2, 3])), tmp_path / "r.json"
    kept.save(file)
    told = json.loads(file.read_text())
    assert told["workload"].pop("precision") == "bf16"
    file.write_text(json.dumps(told))
    assert load(file) == kept


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_recorded_benchmarks_can_still_be_printed(file: Path):
    kept = load(file)
    assert f", {kept.workload.dtype}; rounds: {kept.rounds}," in table.write(kept)


def test_what_was_cut_off_goes_on_where_it_stopped(tmp_path: Path):
    cut = record(run(SHIPPED, 1, [1, 1, 1]), rounds=2)
    assert cut.missing() == [(1, LIVE), (2, SHIPPED), (2, LIVE)]
    file = new_file(tmp_path, cut)
    assert file.name == "2026-01-02-hh-lora.json"
    cut.save(file)
    assert new_file(tmp_path, cut).name == "2026-01-02-hh-lora-2.json"
    fresh = record(rounds=2)
    (tmp_path / "2026-01-03-hh-lora.json").write_text("{")
    (tmp_path / "2026-01-04-hh-lora.json").write_text('{"workload": "x"}')
    assert unfinished(tmp_path, fresh) == file
    assert unfinished(tmp_path, replace(fresh, versions={**fresh.versions, "dpo_lightning": "other"})) is None
    assert unfinished(tmp_path, replace(fresh, workload=replace(WORKLOAD, steps=3))) is None
    exact = replace(fresh, workload=replace(WORKLOAD, precision="32"))
    assert unfinished(tmp_path, exact) is None
    assert new_file(tmp_path, exact).name == "2026-01-02-hh-lora-float32.json"
    on_gpu = replace(exact, workload=replace(exact.workload, device="cuda"))
    assert new_file(tmp_path, on_gpu).name == "2026-01-02-hh-lora-cuda-float32.json"
    cut.runs = [run(arm, number, [1, 1, 1]) for number in (1, 2) for arm in WORKLOAD.arms]
    cut.save(file)
    assert unfinished(tmp_path, fresh) is None


@pytest.mark.parametrize("changed", [True, False])
def test_two_states_of_uncommitted_code_are_not_mixed(changed: bool, tmp_path: Path, monkeypatch, capsys):
    answers = {"rev-parse": "abc", "status": " M conf/config.yaml" if changed else ""}
    monkeypatch.setattr(machine, "_git", lambda *words: answers[words[0]])
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda: False)
    monkeypatch.setattr(machine, "version", lambda package: "1")
    monkeypatch.setattr(program.Bench, "run", lambda self: print("begun", file=sys.stderr))
    monkeypatch.setattr(table, "write", lambda record: "")
    words = ["hh-lora", "--hh", "README.md", "--out", str(tmp_path)]
    assert main([*words, "--resume"]) == (2 if changed else 0)
    refused = (
        "error: --resume: commit abc with changes: what was cut off may be of other code; commit it, or start anew"
    )
    assert capsys.readouterr().err.splitlines() == [refused if changed else "begun"]
    assert main(words) == 0


def test_a_commit_that_git_does_not_tell_is_not_clear(monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *words: "")
    assert not machine.is_clear(machine.commit())


def test_parity_tells_what_differs():
    ours = [Step(1, 0.6931, 2.0, -9, -8), Step(1, 0.7, 2.1, -9, -8)]
    theirs = [Step(9, 0.6931, 2.005, -9, -8), Step(9, 0.70005, 2.1, -9, -8.003)]
    assert compare(theirs, ours) == pytest.approx({"loss": 5e-5, "grad_norm": 5e-3, "chosen": 0, "rejected": 3e-3})
    with pytest.raises(BenchmarkError, match=r"loss differs by 0.0005, allowed 0.0001$"):
        compare(theirs, [ours[0], replace(ours[1], loss=0.69955)])
    with pytest.raises(BenchmarkError, match=r"rejected differs by 0.023, allowed 0.01$"):
        compare(theirs, [ours[0], replace(ours[1], rejected=-7.98)])
    with pytest.raises(BenchmarkError, match=r"grad_norm differs by nan"):
        compare(theirs, [ours[0], replace(ours[1], grad_norm=float("nan"))])


def test_options_change_the_workloads(capsys):
    options = parser().parse_args(["hh-full", "--steps", "1", "--warmup", "0", "--arms", f"{SHIPPED},{LIVE}"])
    (workload,) = chosen(options)
    assert workload == replace(WORKLOADS["hh-full"], steps=1, warmup=0, arms=(SHIPPED, LIVE))
    twice = ["hh-full", *options.workload, "--arms", f"{SHIPPED},{LIVE},{SHIPPED}"]
    assert [one.arms for one in chosen(parser().parse_args(twice))] == [(SHIPPED, LIVE)]
    assert chosen(parser().parse_args([])) == [*WORKLOADS.values()]
    exact = chosen(parser().parse_args(["--precision", "32"]))
    assert exact == [replace(one, precision="32") for one in WORKLOADS.values()]
    for words in (["hh-lroa"], ["--arms", "trl"]):
        assert main(words) == 2
        assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "lacks", "warnings"),
    [
        ([], True, 1),  # one for all workloads
        (["--precision", "bf16"], True, 1),
        (["--precision", "32"], True, 0),
        (["--device", "cuda"], True, 0),
        ([], False, 0),
    ],
)
def test_slow_bfloat16_is_told_beforehand(words: list[str], lacks: bool, warnings: int, monkeypatch, capsys):
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda: lacks)
    monkeypatch.setattr(program, "judge", lambda *_: None)  # whether TRL and the samples are here is no matter
    monkeypatch.setattr(program, "bench", lambda *_: print("begun", file=sys.stderr))
    assert main(words) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [program.SLOW] * warnings + ["begun"] * len(WORKLOADS)
    assert "--precision 32" in program.SLOW


def test_a_benchmark_without_trl_says_nothing_of_it():
    ours = replace(WORKLOAD, arms=(LIVE,))
    assert "TRL" not in table.write(record(run(LIVE, 1, [1, 1, 1], mfu=0.5), workload=ours, rounds=1))
    assert "TRL's token ids" in table.write(record(run(SHIPPED, 1, [1, 1, 1]), rounds=1))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--table", "nofile.json"], "error: --table nofile.json: no record of a benchmark ([Errno 2]"),
        (["--table", "README.md"], "error: --table README.md: no record of a benchmark (Expecting value"),
        (["--table", "other.json"], "error: --table other.json: no record of a benchmark ('str' object"),
        (["hh-full", "--hh", "nofile"], "error: no file nofile: give preference pairs with --hh FILE"),
        (["hh-full", "sharegpt-lora", "--hh", "README.md", "--sharegpt", "nofile"], "error: no file nofile: give"),
    ],
)
def test_a_file_that_is_not_there_or_is_another_is_told_in_a_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "README.md").write_text("# no JSON")
    (tmp_path / "other.json").write_text('{"workload": "x"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda: False)
    monkeypatch.setattr(machine, "versions", lambda: {"trl": "1"})
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(told) and error.count("\n") == 1
