"""Two real ranks under every strategy give one process's numbers; checkpoints go from any strategy to any other."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_lightning.cluster import agreement
from dpo_lightning.types import UserError
from tests.ranks import TINY, rows, run_ranks, trace, traced

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
MODES = {"r16": ("adapter_off", "frozen_copy", "cached"), "none": ("frozen_copy", "cached")}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
# strategy, LoRA or full, reference, accumulation; a step always has 8 pairs
PARITY = [
    *((strategy, lora, mode, 1) for strategy in STRATEGIES for lora, modes in MODES.items() for mode in modes),
    *((strategy, lora, modes[0], n) for strategy in STRATEGIES for lora, modes in MODES.items() for n in (2, 4)),
    *(("zero3_offload", lora, modes[0], 2) for lora, modes in MODES.items()),
]


def name(*case: object) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, cache):
    """Run every case on two ranks, and on one process: three steps each."""
    folder = tmp_path_factory.mktemp("parity")
    words = [*TINY, "trainer.max_steps=3"]
    run_ranks([
        [*words, f"strategy={strategy}", f"lora={lora}", f"reference={mode}", f"data.batch_size={4 // n}",
         f"trainer.accumulate_grad_batches={n}", "trainer.devices=2",
         f"run_dir={folder / name(strategy, lora, mode, n)}"]
        for strategy, lora, mode, n in PARITY
    ], cache)  # fmt: skip
    frozen = ["strategy=zero2", "lora=none", "reference=frozen_copy", "data.batch_size=4", "trainer.devices=2"]
    run_ranks([
        [*words, *frozen, f"trainer.precision={precision}", f"reference.offload={offload}",
         f"run_dir={folder / f'{precision}-{offload}'}"]
        for precision in PRECISIONS for offload in ("true", "false")
    ], cache)  # fmt: skip
    single = [[*words, f"lora={lora}", "data.batch_size=8", f"run_dir={folder / lora}"] for lora in MODES]
    run_ranks(single, cache, world=1)
    return folder


def exported(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", PARITY, ids=lambda case: name(*case))
def test_two_ranks_equal_one_process(compared, case):
    one, two = compared / case[1], compared / name(*case)
    ours, theirs = rows(two), rows(one)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2, 3, 3]
    # a cached log-probability comes from another batch, and is rounded otherwise
    assert ours[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-5 if case[2] == "cached" else 1e-6)
    for a, b in zip(ours, theirs, strict=True):
        for key in {*b} - {f"{stage}/rewards/accuracies" for stage in ("train", "val")}:
            # rewards are differences of sums of some 2000 nats, which float32 knows to 1e-4
            bound = 1e-5 if key in ("train/loss", "train/grad_norm", "val/loss") else 1e-4
            assert a[key] == pytest.approx(b[key], abs=bound, rel=1e-5), (b["step"], key)
    weights, expected = exported(two), exported(one)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key].float(), value.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_offloaded_reference_changes_no_bit(compared, precision):
    offloaded, there = (compared / f"{precision}-{offload}" for offload in ("true", "false"))
    assert rows(offloaded) == rows(there)
    assert {k: v.tolist() for k, v in exported(offloaded).items()} == {
        k: v.tolist() for k, v in exported(there).items()
    }


# 34 pairs, 8 a step: an epoch of 5 steps whose last one has 2 pairs for 4 forward passes; dropout is on.
LONG = [
    *TINY, "trainer.max_epochs=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.devices=2",
    "checkpoint.every_n_steps=1", "checkpoint.keep_last=null", "optim.lr=1e-3",
]  # fmt: skip
STEPS, CUTS = 10, (2, 5, 8)
DROPOUT = {"r16": ["lora=r16", "lora.lora_dropout=0.1"], "none": ["lora=none"]}
EXACT = [
    *((strategy, lora, "auto", "32-true") for strategy in STRATEGIES for lora in DROPOUT),
    *((strategy, "r16", "cached", "bf16-mixed") for strategy in STRATEGIES[1:]),
    ("zero2", "none", "frozen_copy", "bf16-mixed"), ("zero3_offload", "r16", "auto", "32-true"),
]  # fmt: skip


OTHERWISE = {
    "never-saved": "checkpoint.every_n_steps=null", "never-validated": "trainer.limit_val_batches=0",
    "validated-often": "trainer.val_check_interval=4",
}  # fmt: skip


def long_run(run: Path, strategy: str, lora: str, mode: str, precision: str) -> list[str]:
    return traced(
        run, *LONG, *DROPOUT[lora], f"strategy={strategy}", f"reference={mode}", f"trainer.precision={precision}"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Run each case without a stop, a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    others = [[*long_run(folder / other, *EXACT[4]), word] for other, word in OTHERWISE.items()]
    run_ranks([*(long_run(folder / name(*case), *case) for case in EXACT), *others], cache)
    return folder


def cut(run: Path, step: int, to: Path) -> None:
    """Make `to` the folder that `run` would have left if it had been killed after the checkpoint of a step."""
    to.mkdir()
    for file in ("run_id", "metrics.jsonl", "trace-0.jsonl", "trace-1.jsonl"):
        shutil.copy(run / file, to / file)
    shutil.copytree(run / "checkpoints" / f"step-{step:08d}", to / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory, cache):
    """Go on from the middle of an epoch, or from an epoch's end."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = [*zip(EXACT, itertools.cycle(CUTS), strict=False)]
    for case, step in runs:
        cut(whole / name(*case), step, folder / name(*case, step))
        for file in folder.glob("*/trace-*.jsonl"):
            file.unlink()
    run_ranks([long_run(folder / name(*case, step), *case) for case, step in runs], cache)
    return folder


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", EXACT, ids=lambda case: name(*case))
def test_a_resumed_run_has_the_bits_of_the_one_that_was_not_stopped(whole, resumed, case):
    (run,) = resumed.glob(name(*case) + "-*")
    step = int(run.name.rpartition("-")[2])
    for rank in (0, 1):
        expected = trace(whole / name(*case), rank)
        assert [*expected] == [*range(1, STEPS + 1)]
        assert trace(run, rank) == {n: row for n, row in expected.items() if n > step}
    assert rows(run) == rows(whole / name(*case))
    assert {k: v.tobytes() for k, v in arrays(run).items()} == {
        k: v.tobytes() for k, v in arrays(whole / name(*case)).items()
    }


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("other", OTHERWISE)
def test_saving_and_validating_change_nothing_on_two_ranks(whole, other):
    for rank in (0, 1):
        assert trace(whole / other, rank) == trace(whole / name(*EXACT[4]), rank)


def arrays(run: Path):
    return {key: value.float().numpy() for key, value in exported(run).items()}


def pairs_of_steps(run: Path, ranks: int) -> list[list[int]]:
    traces = [trace(run, rank) for rank in range(ranks)]
    return [sorted(id_ for each in traces for id_ in each[step]["ids"]) for step in range(1, STEPS + 1)]


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("lora", DROPOUT)
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(tmp_path, cache, lora):
    """2 ranks of ZeRO-2 to step 3, one process to 6, 2 ranks of ZeRO-3 to the end: the same pairs in each step."""
    plain = [word for word in DROPOUT[lora] if "dropout" not in word]
    reference = tmp_path / "reference"
    words = [*LONG, *plain, "strategy=zero2"]
    run_ranks([traced(reference, *words)], cache)
    run = tmp_path / "run"
    cut(reference, 3, run)
    alone = [*LONG, *plain, "trainer.devices=1", "strategy=single", "trainer.accumulate_grad_batches=4"]
    run_ranks([traced(run, *alone)], cache, world=1)
    for later in (run / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > 6:
            shutil.rmtree(later)
    run_ranks([traced(run, *LONG, *plain, "strategy=zero3")], cache)
    one, two = trace(run, 0), trace(run, 1)
    found = [sorted(one[s]["ids"] + (two[s]["ids"] if s not in (4, 5, 6) else [])) for s in range(1, STEPS + 1)]
    assert found == pairs_of_steps(reference, 2)
    for epoch in (found[:5], found[5:]):
        assert sorted(id_ for step in epoch for id_ in step) == list(range(34))
    for a, b in zip(rows(run), rows(reference), strict=True):
        for key in {"train/loss", "train/grad_norm", "val/loss"} & {*b}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (b["step"], key)
    assert all(a <= b for a, b in itertools.pairwise(row["step"] for row in rows(run)))


@pytest.mark.timeout(1200)
def test_shards_that_three_ranks_cannot_cut_evenly_are_resumed(tmp_path, cache):
    cases = [("zero3", "r16"), ("zero3", "none"), ("zero3_offload", "none")]

    def words(folder: str, strategy: str, lora: str) -> list[str]:
        run = long_run(tmp_path / folder / name(strategy, lora), strategy, lora, "auto", "32-true")
        return [word for word in run if not word.startswith("trainer.devices=")] + ["trainer.devices=3"]

    three = ["trainer.max_steps=3", "data.max_pairs=60"]
    run_ranks([[*words("whole", *case), *three] for case in cases], cache, world=3)
    (tmp_path / "resumed").mkdir()
    for case in cases:
        whole, resumed = (tmp_path / each / name(*case) for each in ("whole", "resumed"))
        cut(whole, 2, resumed)
        for file in resumed.glob("trace-*.jsonl"):
            file.unlink()
    run_ranks([[*words("resumed", *case), *three] for case in cases], cache, world=3)
    for case in cases:
        whole, resumed = (tmp_path / each / name(*case) for each in ("whole", "resumed"))
        for rank in range(3):
            expected = trace(whole, rank)
            assert trace(resumed, rank) == {step: row for step, row in expected.items() if step > 2}
        assert rows(resumed) == rows(whole)
        file = "adapter/adapter_model.safetensors" if case[1] == "r16" else "model/model.safetensors"
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "key"),
    [(["loss.beta=0.{rank}5"], "loss.beta: 0.05 on rank 0, 0.15 on rank 1"), (["seed={rank}"], "seed: 0 on rank 0")],
)
def test_ranks_that_would_train_otherwise_are_refused_before_the_first_step(tmp_path, cache, words, key):
    run = [*TINY, "trainer.devices=2", "trainer.max_steps=1", "strategy=ddp", f"run_dir={tmp_path / 'run'}", *words]
    for output in run_ranks([run], cache, code=2):
        assert f"error: {key}" in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ranks_with_other_folders_or_checkpoints_are_refused(tmp_path, cache, monkeypatch):
    """As from another second of the clock, or from a file system that shows a checkpoint late."""
    words = [*TINY, "trainer.devices=2", "trainer.max_steps=1", "strategy=ddp"]
    for output in run_ranks([[*words, f"run_dir={tmp_path}/run-{{rank}}"]], cache, code=2):
        assert f"error: run_dir: {tmp_path}/run-0 on rank 0, {tmp_path}/run-1 on rank 1" in output
    dated = [*words, f"env:DPO_LIGHTNING_RUN_DIR={tmp_path}/run-{{rank}}"]
    for output in run_ranks([dated], cache, code=2):
        folders = f"{tmp_path}/run-0 on rank 0, {tmp_path}/run-1 on rank 1"
        assert f"error: run folder (run_dir= sets it): {folders}; start every rank alike" in output
    plans = [json.dumps({"seed": 1, "checkpoint": checkpoint}) for checkpoint in ("step-00000008", "None")]
    monkeypatch.setattr(agreement, "gather_texts", lambda text, device: plans)
    own = agreement.Agreement({}, lambda trainer: pytest.fail("it was begun"))
    with pytest.raises(UserError, match="checkpoint: step-00000008 on rank 0, None on rank 1"):
        own.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=None)), None, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_that_had_ended_exports_the_same_once_more(whole, tmp_path, cache, strategy):
    """As a job that was killed between its last checkpoint and its export does when it is started again."""
    case = (strategy, "none", "auto", "32-true")
    run = tmp_path / "run"
    cut(whole / name(*case), STEPS, run)
    run_ranks([long_run(run, *case)], cache)
    assert {k: v.tobytes() for k, v in arrays(run).items()} == {
        k: v.tobytes() for k, v in arrays(whole / name(*case)).items()
    }


def test_a_sharded_16_bit_run_answers_prompts_at_its_end(tmp_path):
    """With an empty cache: the random weights that it starts from must not be made in shards."""
    words = [word for word in LONG if not word.startswith("samples.count")]
    more = ["samples.count=1", "samples.max_new_tokens=4", "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    kept = [word for word in words if not word.startswith("trainer.precision")]
    run_ranks([[*kept, *more, "trainer.precision=bf16-mixed", "lora=none", "strategy=zero3"]], tmp_path / "cache")
    (answer,) = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert {*answer} == {"prompt", "reference", "policy"}


def test_a_lock_that_a_killed_compilation_left_is_waited_for_by_nobody(tmp_path, monkeypatch):
    from dpo_lightning.training.zero import clear_stale_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / "deepspeed_old" / "lock", tmp_path / "deepspeed_now" / "lock", tmp_path / "other" / "lock"]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    for lock in (locks[0], locks[2]):
        os.utime(lock, (1, 1))
    clear_stale_locks()
    assert [lock.exists() for lock in locks] == [False, True, True]


def test_a_head_with_an_adapter_is_sharded_like_the_rest(tmp_path, cache):
    """Its 2,048 tokens are enough for ZeRO-3 to shard it; smaller weights stay whole."""
    words = [
        *TINY, "trainer.max_steps=2", "data.max_pairs=16", "lora.target_modules=[q_proj,lm_head]",
        "+model.dimensions.vocab_size=2048", "model.dimensions.tie_word_embeddings=false",
    ]  # fmt: skip
    run_ranks([[*words, "data.batch_size=4", f"run_dir={tmp_path / 'one'}"]], cache, world=1)
    two = ["trainer.devices=2", "strategy=zero3", "data.batch_size=2"]
    run_ranks([[*words, *two, f"run_dir={tmp_path / 'two'}"]], cache)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in {"train/loss", "train/grad_norm", "val/loss"} & {*theirs}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), key
    weights, expected = exported(tmp_path / "two"), exported(tmp_path / "one")
    assert any("lm_head" in key for key in expected)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-5)
