"""A stop at any step, saving and validating leave no trace in what is learned; and no file runs code."""

import json
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from dpo_lightning.checkpoints.resume import to_resume
from dpo_lightning.checkpoints.saver import HOLDS, Saver
from dpo_lightning.types import UserError
from tests.ranks import TINY, rows, run_ranks, trace, traced

STEPS = 10
WORDS = [
    *TINY, "trainer.max_epochs=2", "data.batch_size=4", "trainer.accumulate_grad_batches=2", "optim.lr=1e-3",
    "checkpoint.keep_last=null",
]  # fmt: skip
LORA, FULL = ["lora.lora_dropout=0.1", "checkpoint.every_n_steps=1"], ["lora=none", "checkpoint.every_n_steps=1"]
OTHERS = {
    "never-saved": [*LORA[:1], "checkpoint.every_n_steps=null"],
    "never-validated": [*LORA, "trainer.limit_val_batches=0"],
    "validated-every-2-steps": [*LORA, "trainer.val_check_interval=4"],
    "logged-every-3-steps": [*LORA, "trainer.log_every_n_steps=3"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """Run without a stop, with other savings and validations, and from every checkpoint on."""
    folder = tmp_path_factory.mktemp("exact")
    whole = {"lora": LORA, "full": FULL, **OTHERS}
    run_ranks([traced(folder / name, *WORDS, *words) for name, words in whole.items()], cache, world=1)
    cuts = []
    for name, words, steps in (("lora", LORA, range(1, STEPS)), ("full", FULL, (1, 5, 8)),
                               ("logged-every-3-steps", OTHERS["logged-every-3-steps"], (4, 5))):  # fmt: skip
        for step in steps:
            run = folder / f"{name}-cut-{step}"
            place = run / "checkpoints" / f"step-{step:08d}"
            shutil.copytree(folder / name / "checkpoints" / place.name, place)
            for file in ("run_id", "metrics.jsonl"):
                shutil.copy(folder / name / file, run / file)
            cuts.append(traced(run, *WORDS, *words))
    run_ranks(cuts, cache, world=1)
    return folder


class Count(pl.Callback):
    """A callback with a state, as an average over weights has one."""

    def __init__(self, file: str):
        self.file, self.batches = Path(file), 0

    def on_train_batch_end(self, *args):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]

    def on_train_end(self, *args):
        self.file.write_text(str(self.batches))


def test_a_checkpoint_holds_what_other_callbacks_have_made_of_its_step(tmp_path, cache):
    words = [*WORDS, *LORA, "+callbacks.count._target_=tests.checkpoints.test_exact.Count"]
    runs = {
        name: [*words, f"run_dir={tmp_path / name}", f"+callbacks.count.file={tmp_path / name}.count",
               "trusted_targets=[tests.checkpoints.test_exact.Count]"]
        for name in ("whole", "stopped")
    }  # fmt: skip
    run_ranks(
        [[*runs["whole"], "trainer.max_steps=4"], *([*runs["stopped"], f"trainer.max_steps={n}"] for n in (2, 4))],
        cache, world=1,
    )  # fmt: skip
    whole, stopped = ((tmp_path / f"{name}.count").read_text() for name in runs)
    assert stopped == whole == "8"


@pytest.mark.parametrize(("name", "step"), [*(("lora", n) for n in range(1, STEPS)), *(("full", n) for n in (1, 5, 8))])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(runs, name, step):
    whole, resumed = runs / name, runs / f"{name}-cut-{step}"
    assert [*trace(whole)] == [*range(1, STEPS + 1)]
    assert trace(resumed) == {n: row for n, row in trace(whole).items() if n > step}
    assert rows(resumed) == rows(whole)
    kind = "adapter/adapter_model.safetensors" if name == "lora" else "model/model.safetensors"
    assert (resumed / kind).read_bytes() == (whole / kind).read_bytes()


@pytest.mark.parametrize("name", [*OTHERS][:3])
def test_saving_and_validating_change_nothing(runs, name):
    assert trace(runs / name) == trace(runs / "lora")


@pytest.mark.parametrize("step", [4, 5])
def test_means_over_several_steps_go_on_in_the_middle(runs, step):
    whole = rows(runs / "logged-every-3-steps")
    assert [row["step"] for row in whole if "train/loss" in row] == [3, 6, 9, 10]
    assert rows(runs / f"logged-every-3-steps-cut-{step}") == whole


class Bomb:
    """What a pickle can do: anything."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_checkpoint_that_would_run_code_is_refused(runs, tmp_path, cache):
    """Whole by its manifest, as an attacker's would be: the loader itself must refuse it."""
    from dpo_lightning.checkpoints.writer import publish

    marker, run = tmp_path / "ran", tmp_path / "run"
    good = runs / "lora" / "checkpoints" / "step-00000004"
    manifest = json.loads((good / "manifest.json").read_text())
    facts = {key: value for key, value in manifest.items() if key != "files"}
    files = {
        "state.ckpt": lambda stream: torch.save({"state_dict": Bomb(marker)}, stream),
        "config.json": lambda stream: stream.write((good / "config.json").read_bytes()),
    }
    publish(run / "checkpoints" / "step-00000004", files, facts)
    state = to_resume("auto", run)
    with pytest.raises(UserError, match="more than tensors"):
        Saver({}, {}, None).load_checkpoint(state, weights_only=False)
    run_ranks([traced(run, *WORDS, *LORA)], cache, world=1, code=2)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be loaded"),
        (pickle.dumps({"state_dict": {}}), "cannot be loaded"),
        (b"PK\x03\x04" + bytes(40), "cannot be loaded"),
        (
            {"state_dict": {}, "loops": {}, "global_step": 1},
            "it holds no pytorch-lightning_version, optimizer_states, ",
        ),
        ([], "it holds no pytorch-lightning_version, "),
    ],
    ids=["empty", "pickle", "half a zip", "other keys", "no mapping"],
)
def test_a_state_that_no_training_has_saved_is_told(content, said, tmp_path):
    """Whole by its manifest, so that the loader alone can tell."""
    state = tmp_path / "state.ckpt"
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    with pytest.raises(UserError, match=rf"^resume: {state} .*{said}.* give resume=PATH of another checkpoint$"):
        Saver({}, {}, None).load_checkpoint(state)


def test_another_configuration_or_other_pairs_are_refused(runs, tmp_path, cache):
    run = tmp_path / "run"
    shutil.copytree(runs / "lora" / "checkpoints", run / "checkpoints")
    words = traced(run, *WORDS, *LORA)
    cases = {
        "loss.beta: 0.1 in the checkpoint, 0.2 now": ["loss.beta=0.2"],
        "data.batch_size: a step would have 4 pairs, in the checkpoint it has 8": ["data.batch_size=2"],
        "data.max_pairs: 40 in the checkpoint, 30 now": ["data.max_pairs=30"],
        "was trained on other pairs than shipped:explainer gives now; give the old ones, or "
        "resume_allow=[data.max_pairs,data] ": ["data.max_pairs=30", "resume_allow=[data.max_pairs]"],
    }
    runs_refused = []
    for changed in cases.values():
        keys = {word.partition("=")[0] for word in changed}
        runs_refused.append([*(word for word in words if word.partition("=")[0] not in keys), *changed])
    (output,) = run_ranks(runs_refused, cache, world=1, code=2)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    place = f"error: the checkpoint is {run / 'checkpoints'}/"
    refusals = [line for line in told if not line.startswith(place)]
    assert len(told) == len(refusals) + 2, "keys that differ are told with the checkpoint they differ from"
    for said, refusal in zip(cases, refusals, strict=True):
        assert said in refusal
    other = tmp_path / "other"
    shutil.copytree(runs / "full", other)
    path = runs / "lora" / "checkpoints" / "step-00000004"
    (output,) = run_ranks([traced(other, *WORDS, *LORA, f"resume={path}")], cache, world=1, code=2)
    assert "holds a run that was not begun from" in output


def test_other_pairs_are_trained_on_where_the_whole_group_is_allowed(runs, tmp_path, cache):
    """As the refusals say."""
    run = tmp_path / "run"
    shutil.copytree(runs / "lora" / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    kept = [word for word in traced(run, *WORDS, *LORA) if not word.startswith("data.max_pairs")]
    run_ranks([[*kept, "data.max_pairs=30", "resume_allow=[data]"]], cache, world=1)
    assert next(iter(trace(run))) == 5


def test_what_is_allowed_to_change_takes_effect(runs, tmp_path, cache):
    """Another learning rate from step 4 on; and the job that was begun there goes on where it has come to."""
    path, run = runs / "lora" / "checkpoints" / "step-00000004", tmp_path / "run"
    kept = [word for word in [*WORDS, *LORA] if not word.startswith("optim.lr")]
    again = traced(run, *kept, "optim.lr=2e-3", "resume_allow=[optim.lr]", f"resume={path}")
    run_ranks([[*again, "trainer.max_steps=6"], again], cache, world=1)
    mine, before = trace(run), trace(runs / "lora")
    assert [*mine] == [5, 6, 7, 8, 9, 10]
    for step in (7, 8, 9, 10):  # max_steps has shortened the schedule of the first start
        assert float.fromhex(mine[step]["lr"]) == pytest.approx(2 * float.fromhex(before[step]["lr"]))


def test_a_step_that_saves_waits_for_a_copy_alone(tmp_path, monkeypatch):
    """The writing goes on beside the training: a disk that takes a second costs the step none of it."""
    monkeypatch.setenv("DPO_LIGHTNING_FAULT", "at=save.begin;do=sleep:1")
    monkeypatch.setenv("DPO_LIGHTNING_ALLOW_FAULTS", "1")
    saver = Saver({}, {"run": "a"}, keep_last=2)
    slow = {**dict.fromkeys(HOLDS), "global_step": 1, "state_dict": {"w": torch.ones(1000)}}
    began = time.perf_counter()
    saver.save_checkpoint(slow, tmp_path / "checkpoints" / "step-00000001")
    waited = time.perf_counter() - began
    slow["state_dict"]["w"].zero_()  # as the next step's update would
    saver.finish()
    state = to_resume("auto", tmp_path)
    assert state is not None
    assert saver.load_checkpoint(state)["state_dict"]["w"].eq(1).all()
    assert waited < 0.7


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, capsys, monkeypatch):
    saver = Saver({}, {"run": "a"}, keep_last=2)
    saver.save_checkpoint({"global_step": 1}, tmp_path / "checkpoints" / "step-00000001")
    saver.finish()
    monkeypatch.setenv("DPO_LIGHTNING_FAULT", "at=save.before_manifest;do=enospc")
    monkeypatch.setenv("DPO_LIGHTNING_ALLOW_FAULTS", "1")
    saver.save_checkpoint({"global_step": 2}, tmp_path / "checkpoints" / "step-00000002")
    saver.finish()
    assert "checkpoint 2 cannot be saved" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.delenv("DPO_LIGHTNING_FAULT")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # the disk is full within a tensor
    try:
        big = {"global_step": 2, "state_dict": {"w": torch.ones(100_000)}}
        saver.save_checkpoint(big, tmp_path / "checkpoints" / "step-00000002")
        saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert "checkpoint 2 cannot be saved" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setenv("DPO_LIGHTNING_FAULT", "at=save.before_manifst;do=enospc")
    saver.save_checkpoint({"global_step": 3}, tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(ValueError, match="no point"):
        saver.finish()
    with pytest.raises(UserError, match="no such checkpoint"):
        to_resume(str(tmp_path / "checkpoints" / "step-00000003"), tmp_path)
