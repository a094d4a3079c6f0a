"""The arms' commands, and the pairs that both programs are given."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import arms, machine
from benchmarks.__main__ import chosen, parser
from benchmarks.pairs import token_digest, write_pairs
from benchmarks.runs import ROOT, BenchmarkError, run_child
from benchmarks.workloads import ARMS, CACHED, CHECKPOINTED, COMPACT, LIVE, SHIPPED, TUNED, WORKLOADS
from dpo_lightning.config import CONF, check
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.model.tiny import byte_tokenizer

OURS = [LIVE, CACHED, CHECKPOINTED]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ROWS = [
    {"chosen": "\n\nHuman: one?\n\nAssistant: yes", "rejected": "\n\nHuman: one?\n\nAssistant: no"},
    {"prompt": turns("same?"), "chosen": answer("a"), "rejected": answer("a")},  # says nothing
    {"prompt": turns("long?"), "chosen": answer("x" * 200), "rejected": answer("y")},  # does not fit
    {"prompt": turns("two?", "eh", "sure?"), "chosen": answer("aye"), "rejected": answer("nay")},
    {"prompt": turns("three?"), "chosen": answer("si"), "rejected": answer("nein")},
]
KEPT = [(turns("one?"), "yes", "no"), (turns("two?", "eh", "sure?"), "aye", "nay"), (turns("three?"), "si", "nein")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_rows_are_the_first_pairs_that_fit_in_file_order_and_again_from_the_first(data: Path, tmp_path: Path):
    out = tmp_path / "pairs.jsonl"
    told = write_pairs(str(data), out, 5, byte_tokenizer(), 100)
    wanted = [{"prompt": p, "chosen": answer(c), "rejected": answer(r)} for p, c, r in [*KEPT, *KEPT[:2]]]
    assert [json.loads(line) for line in out.read_text().splitlines()] == wanted
    assert (told["distinct"], told["left_out"], len(told["lengths"])) == (3, 2, 5)
    assert max(p + max(c, r) for p, c, r in told["lengths"]) <= 100

    two = write_pairs(str(data), out, 1, byte_tokenizer(), 100)
    assert (two["distinct"], two["left_out"]) == (1, 0)  # rows behind the last pair that is wanted are not counted
    with pytest.raises(ValueError, match="no pair of messages within 10 tokens"):
        write_pairs(str(data), out, 1, byte_tokenizer(), 10)


def test_a_training_takes_the_tokens_that_were_digested(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "pairs.jsonl"
    told = write_pairs(str(data), out, 5, byte_tokenizer(), 100)
    module = PreferenceData(
        path=str(out), val_path=str(out), load_tokenizer=byte_tokenizer, seed=0, max_length=100, batch_size=2,
        val_fraction=0.5, shuffle=False,
    )  # fmt: skip
    module.prepare_data()
    rows = [[row["prompt"], row["chosen"], row["rejected"]] for row in module.train]
    assert token_digest(rows) == told["digest"]
    assert [[*map(len, row)] for row in rows] == told["lengths"]
    assert token_digest(rows[::-1]) != told["digest"]


@pytest.mark.parametrize("precision", ["bf16", "32"])
@pytest.mark.parametrize("arm", OURS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_our_words_compose_to_what_the_workload_says(name: str, arm: str, precision, data: Path, tmp_path: Path):
    workload = replace(WORKLOADS[name], precision=precision)
    words = arms.our_words(workload, arm, data, tmp_path / "run")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", words)
    check(cfg)
    assert cfg.data.batch_size == workload.pairs and cfg.trainer.max_steps == workload.all_steps
    assert cfg.trainer.max_steps - workload.warmup >= 16
    assert cfg.data.path == cfg.data.val_path == str(data)
    assert not cfg.data.shuffle
    assert ("r" in cfg.lora) == workload.lora
    assert cfg.optim.lr == workload.lr
    assert cfg.reference.mode == ("cached" if arm == CACHED else "adapter_off" if workload.lora else "frozen_copy")
    assert cfg.model.gradient_checkpointing == (arm == CHECKPOINTED)
    assert cfg.trainer.precision == {"bf16": "bf16-mixed", "32": "32-true"}[precision]


def test_on_cuda_both_programs_are_given_one_gpu_and_the_model_that_was_asked_for(data: Path, tmp_path: Path):
    words = ["hh-lora", "--device", "cuda", "--model", "model=gemma2b model.init=random"]
    (workload,) = chosen(parser().parse_args(words))
    assert COMPACT not in workload.arms  # it is on there by itself
    ours = arms.our_words(workload, LIVE, data, tmp_path / "run")
    assert {"model=gemma2b", "model.init=random", "trainer.accelerator=gpu", "trainer.devices=1"} <= {*ours}
    assert arms.trl_config(workload, SHIPPED, tmp_path)["use_cpu"] is False
    assert arms.environment(LIVE, tmp_path, {}, workload.device)["CUDA_VISIBLE_DEVICES"] == "0"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"train/loss": 0.5, "perf/device_memory_gb": 1.5}))
    (tmp_path / "trl.json").write_text(json.dumps({"peak_device": 7}))
    assert (arms.read_memory(LIVE, tmp_path), arms.read_memory(SHIPPED, tmp_path)) == (1_500_000_000, 7)


def test_trl_arms_differ_from_what_is_shipped_in_what_they_say():
    workload, folder = WORKLOADS["hh-lora"], Path("x")
    shipped, tuned = (arms.trl_config(workload, arm, folder) for arm in (SHIPPED, TUNED))
    assert {*shipped} & {"gradient_checkpointing", "precompute_ref_log_probs", "bf16", "model_init_kwargs"} == set()
    assert {key: value for key, value in tuned.items() if shipped.get(key) != value} == {
        "gradient_checkpointing": False, "precompute_ref_log_probs": True, "bf16": True,
        "model_init_kwargs": {"dtype": "bfloat16"},
    }  # fmt: skip
    assert arms.trl_config(workload, COMPACT, folder) == tuned
    assert "model_init_kwargs" not in arms.trl_config(WORKLOADS["hh-full"], TUNED, folder)
    jobs = {arm: json.loads(arms.command(workload, arm, folder, folder, "m")[-1]) for arm in ARMS if arm[:3] == "trl"}
    assert [arm for arm, job in jobs.items() if job["compact"]] == [COMPACT]
    assert jobs[SHIPPED]["lora"]["r"] == 16
    assert json.loads(arms.command(WORKLOADS["hh-full"], SHIPPED, folder, folder, "m")[-1])["lora"] is None


@pytest.mark.parametrize("arm", [SHIPPED, TUNED, COMPACT])
def test_trl_arms_in_float32_differ_in_that_alone(arm: str):
    workload = WORKLOADS["hh-lora"]
    both = (replace(workload, precision="32"), workload)
    config, other = (arms.trl_config(one, arm, Path("x")) for one in both)
    assert config["bf16"] is False
    assert "model_init_kwargs" not in config  # TRL's default is float32
    ignored = {"bf16", "model_init_kwargs"}
    assert {key: config[key] for key in {*config} - ignored} == {key: other[key] for key in {*other} - ignored}


def test_environment_is_the_arms_own(tmp_path: Path):
    shell = {"PATH": "p", "MALLOC_TOP_PAD_": "1", "OMP_NUM_THREADS": "99", "DPO_LIGHTNING_RUN_DIR": "x"}
    plain, tuned = (arms.environment(arm, tmp_path, shell) for arm in (SHIPPED, COMPACT))
    assert plain["PATH"] == "p"
    assert plain["OMP_NUM_THREADS"] == str(arms.cores())
    assert not {"MALLOC_TOP_PAD_", "THP_MEM_ALLOC_ENABLE", "DPO_LIGHTNING_RUN_DIR"} & {*plain}
    assert {**plain, **arms.ALLOCATOR} == tuned
    assert arms.environment(CACHED, tmp_path, shell) == plain


def test_steps_are_read_from_what_a_run_left(tmp_path: Path):
    logps = {"train/logps/chosen": -9.0, "train/logps/rejected": -8.0}
    row = {"step": 1, "train/loss": 0.5, "train/grad_norm": 2.0, "perf/pairs_per_second": 4.0, **logps}
    lines = [row, {"step": 2, "val/loss": 0.4}, {**row, "step": 2, "perf/mfu": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = arms.read_steps(LIVE, tmp_path, pairs=8)
    assert read == [arms.Step(2.0, 0.5, 2.0, -9.0, -8.0), arms.Step(2.0, 0.5, 2.0, -9.0, -8.0, 0.6)]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "train/grad_norm": None}))
    assert math.isnan(arms.read_steps(LIVE, tmp_path, pairs=8)[0].grad_norm)  # it was not finite
    step = {"seconds": 3.0, "loss": 0.5, "grad_norm": 2.0, "chosen": -9.0, "rejected": -8.0}
    (tmp_path / "trl.json").write_text(json.dumps({"steps": [step]}))
    assert arms.read_steps(SHIPPED, tmp_path, pairs=8) == [arms.Step(3.0, 0.5, 2.0, -9.0, -8.0)]


def test_a_childs_memory_is_its_own(tmp_path: Path):
    """Told by a process like the benchmark's: a child starts with the count of its parent, and this one is large."""
    code = (
        "import os, sys; from pathlib import Path; from benchmarks.runs import run_child;"
        "words = [[sys.executable, '-c', text] for text in ('pass', 'x = b\"1\" * 200_000_000')];"
        "print(*(run_child(line, {**os.environ}, Path(sys.argv[1])).peak_rss for line in words))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "log")]
    told = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    small, large = map(int, told.stdout.split())
    assert small < 100_000_000
    assert 200_000_000 < large < 300_000_000


def test_a_childs_failure_is_told_with_its_last_words(tmp_path: Path):
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 3.*the reason"):
        run_child([sys.executable, "-c", "print('the reason'); exit(3)"], {}, tmp_path / "log")


def test_machine_names_no_host_and_no_path(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Fast One\nprocessor : 1\nmodel name : Fast One\n")
    told = machine.describe(cpuinfo=cpuinfo)
    assert told["processor"] == "Fast One"
    assert {*told} == {"processor", "cores", "threads", "memory_gb"}
    assert "/" not in json.dumps([told, machine.versions()])


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("flags\t\t: fpu avx2 avx512bw\nvmx flags\t: amx_bf16\n", True),
        ("flags\t\t: fpu avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd\n", False),  # ARM's: nothing is known
        (None, False),
    ],
)
def test_a_processor_without_bfloat16_is_known_by_its_flags(text: str | None, lacks: bool, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert machine.lacks_bfloat16(cpuinfo) is lacks


def test_the_parent_stays_small():
    code = (
        "import sys; from benchmarks import __main__ as program, workloads;"
        "program.warn(workloads.WORKLOADS.values()); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.split() == ["False"]
