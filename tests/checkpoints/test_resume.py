"""A run goes on from the newest checkpoint that is whole, says why another is not, and never starts over by itself."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.checkpoints import resume, starts
from dpo_lightning.checkpoints.changes import compare_config
from dpo_lightning.checkpoints.folder import step_of, verify
from dpo_lightning.checkpoints.resume import newest, to_resume
from dpo_lightning.checkpoints.writer import publish
from dpo_lightning.types import UserError

OLD, NEW = "step-00000008", "step-00000012"
LAUNCHERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def save(run: Path, name: str, of: str = "a") -> Path:
    folder = run / "checkpoints" / name
    data = {"state.ckpt": random.Random(name).randbytes(100), "config.json": b'{"seed": 42, "loss": {"beta": 0.1}}'}
    writers = {file: (lambda stream, data=data[file]: stream.write(data)) for file in data}
    publish(folder, writers, {"step": int(name.removeprefix("step-")), "run": of})
    return folder


@pytest.fixture
def run(tmp_path):
    """A run's folder with two whole checkpoints."""
    folder = tmp_path / "run"
    save(folder, OLD)
    save(folder, NEW)
    (folder / "run_id").write_text("a\n")
    return folder


def taken(run: Path) -> str:
    state = newest(run)
    assert state is not None and state.name == "state.ckpt"
    return state.parent.name


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.Random(file.name).randrange(len(data))] ^= 1 << random.Random(len(data)).randrange(8)
    file.write_bytes(data)


def delete(file: Path) -> None:
    file.unlink()


def folder_instead(file: Path) -> None:
    """What cannot be read: mode 000 hinders no root, whom the tests often run as."""
    file.unlink()
    file.mkdir()


def pipe_instead(file: Path) -> None:
    """What whoever opens it would wait on for ever."""
    file.unlink()
    os.mkfifo(file)


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"}")


DAMAGE: dict[str, tuple[Any, str]] = {
    "emptied": (lambda file: cut(file, 0), "is truncated: 0 of"),
    "one byte left": (lambda file: cut(file, 1), "is truncated: 1 of"),
    "half left": (lambda file: cut(file, file.stat().st_size // 2), "is truncated: "),
    "a flipped bit": (flip, "its content differs from its sha256"),
    "grown": (grow, "is too long"),
    "deleted": (delete, "is missing"),
    "a folder in its place": (folder_instead, "is not a file"),
    "a pipe in its place": (pipe_instead, "is not a file"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["state.ckpt", "config.json", "manifest.json"])
def test_a_broken_checkpoint_is_named_set_aside_and_the_one_before_it_taken(name, how, run, capsys):
    damage, reason = DAMAGE[how]
    damage(run / "checkpoints" / NEW / name)
    found = verify(run / "checkpoints" / NEW)
    assert found is not None
    if name != "manifest.json" or "missing" in reason or "not a file" in reason:
        assert found.startswith(name) and reason in found
    assert taken(run) == OLD
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"skipping {run}/checkpoints/{NEW}: {found}; moved to broken-{NEW}"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"broken-{NEW}", OLD]
    assert (run / "checkpoints" / f"broken-{NEW}").is_dir()
    assert taken(run) == OLD
    assert capsys.readouterr().out == ""


def test_no_single_flipped_bit_of_a_manifest_goes_unseen(run):
    file = run / "checkpoints" / NEW / "manifest.json"
    data = file.read_bytes()
    seen = 0
    for place in range(len(data) * 8):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        seen += verify(file.parent) is not None
    assert seen == len(data) * 8 > 2000


def of_another_run(run):
    shutil.rmtree(run / "checkpoints" / NEW)
    save(run, NEW, of="b")


def of_no_run(run):
    file = run / "checkpoints" / NEW / "manifest.json"
    file.write_text(file.read_text().replace('"run"', '"ruin"'))


def older_content(run):
    shutil.rmtree(run / "checkpoints" / NEW)
    shutil.copytree(run / "checkpoints" / OLD, run / "checkpoints" / NEW)


def swapped(run):
    one, other = (run / "checkpoints" / NEW / name for name in ("state.ckpt", "config.json"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def empty(run):
    shutil.rmtree(run / "checkpoints" / NEW)
    (run / "checkpoints" / NEW).mkdir()


def manifest(text: str) -> Any:
    return lambda run: (run / "checkpoints" / NEW / "manifest.json").write_text(text)


WRONG: dict[str, tuple[Any, str]] = {
    "of another run": (of_another_run, "manifest.json is of run 'b', not of this folder's 'a'"),
    "of no run": (of_no_run, "manifest.json is of run None, not of this folder's 'a'"),
    "an older one's content": (older_content, "manifest.json is of step 8, not of 12"),
    "files swapped": (swapped, "state.ckpt is truncated: 35 of 100 bytes"),
    "empty folder": (empty, "manifest.json is missing"),
    "no mapping": (manifest("[]"), "manifest.json names no state.ckpt or no config.json"),
    "no files": (manifest('{"step": 12, "run": "a"}'), "manifest.json names no state.ckpt or no config.json"),
    "files without state": (manifest('{"files": {}}'), "manifest.json names no state.ckpt or no config.json"),
    "an earlier format": (manifest('{"state.ckpt": "00"}'), "manifest.json names no state.ckpt or no config.json"),
    "nested beyond measure": (manifest("[" * 100_000), "manifest.json is not JSON"),
    "no text": (manifest("\x00\x01"), "manifest.json is not JSON"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_checkpoint_of_this_run_is_passed_over(how, run, capsys):
    damage, reason = WRONG[how]
    damage(run)
    assert verify(run / "checkpoints" / NEW) == reason
    assert taken(run) == OLD
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "../step-00000008/state.ckpt",
        "/etc/passwd",
        "a/b",
        "",
        ".",
        "..",
        ".hidden",
        "a\nb",
        "a\x00b",
        "..\\x",
        "ä",
        "~",
    ],
)
def test_a_manifest_names_no_file_outside_its_folder(name, run):
    file = run / "checkpoints" / NEW / "manifest.json"
    content = json.loads(file.read_text())
    content["files"][name] = content["files"]["state.ckpt"]
    file.write_text(json.dumps(content))
    assert verify(file.parent) == f"manifest.json names {name!r}, which is no plain file name"


@pytest.mark.parametrize(
    "entry",
    [None, "00", {"bytes": 100}, {"bytes": "100", "sha256": ""}, {"bytes": 1.0, "sha256": ""},
     {"bytes": True, "sha256": ""}, {"bytes": 1, "sha256": None}, {"bytes": 1, "sha256": "", "file": "x"}],
)  # fmt: skip
def test_a_manifest_has_size_and_sha256_of_each_file(entry, run):
    file = run / "checkpoints" / NEW / "manifest.json"
    content = json.loads(file.read_text())
    content["files"]["state.ckpt"] = entry
    file.write_text(json.dumps(content))
    assert verify(file.parent) == "manifest.json does not hold bytes and sha256 of state.ckpt"


def test_a_name_that_no_file_can_have_is_a_broken_checkpoint(run):
    file = run / "checkpoints" / NEW / "manifest.json"
    content = json.loads(file.read_text())
    content["files"]["a" * 300] = content["files"]["state.ckpt"]
    file.write_text(json.dumps(content))
    assert verify(file.parent) == f"{'a' * 300} cannot be read: File name too long"


def test_a_file_that_no_manifest_names_does_no_harm(run):
    (run / "checkpoints" / NEW / "pinned").touch()
    assert verify(run / "checkpoints" / NEW) is None


def test_the_newest_is_that_of_the_highest_number_and_of_nothing_else(run):
    for name in ("step-00000099.bak", "step-", "broken-step-00000099", ".step-00000099-7", "other-step-00000099"):
        shutil.copytree(run / "checkpoints" / NEW, run / "checkpoints" / name)
    (run / "checkpoints" / "step-00000098").touch()
    (run / "checkpoints" / "step-00000097").symlink_to(run / "checkpoints" / NEW)
    assert taken(run) == NEW
    save(run, "step-100000000")
    assert taken(run) == "step-100000000"
    assert (run / "checkpoints" / "step-00000097").is_symlink()


def test_a_broken_one_has_a_name_of_its_own(run):
    for _ in range(3):
        (run / "checkpoints" / NEW / "state.ckpt").unlink()
        assert taken(run) == OLD
        save(run, NEW)
    there = {path.name for path in (run / "checkpoints").glob("broken-*")}
    assert there == {f"broken-{NEW}", f"broken-{NEW}-2", f"broken-{NEW}-3"}


def test_where_nothing_can_be_moved_the_run_goes_on_all_the_same(run, monkeypatch, capsys):
    def rename(old, new):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (run / "checkpoints" / NEW / "state.ckpt").unlink()
    monkeypatch.setattr(resume.os, "rename", rename)
    assert taken(run) == OLD
    assert "it cannot be moved aside: Read-only file system" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun chooses the first node by itself
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's child in an interactive job
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_only_the_first_process_moves_and_says_something(environment, first, run, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (run / "checkpoints" / NEW / "state.ckpt").unlink()
    assert taken(run) == OLD
    assert (run / "checkpoints" / NEW).exists() is not first
    assert ("skipping" in capsys.readouterr().out) is first


def break_all(run: Path) -> None:
    for name in (OLD, NEW):
        (run / "checkpoints" / name / "state.ckpt").unlink()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_with_none_left_a_run_does_not_start_over_by_itself(rank, run, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    break_all(run)
    for _ in range(2):  # the second time they have been set aside
        with pytest.raises(UserError, match=r"none of its checkpoints is whole.*or resume=never to start anew$"):
            to_resume("auto", run)
    if rank == "0":
        assert to_resume("never", run) is None


def test_a_run_that_has_trained_starts_over_in_another_folder(run, tmp_path):
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.69}\n')
    break_all(run)
    with pytest.raises(UserError, match=r"none of its checkpoints is whole.*or another run_dir to start anew$"):
        to_resume("auto", run)
    with pytest.raises(UserError, match="holds a run, which resume=never would start over; choose another folder"):
        to_resume("never", run)
    shutil.rmtree(run / "checkpoints")
    (run / "adapter").mkdir()
    with pytest.raises(UserError, match="holds a run, and no checkpoint to go on from; choose another folder"):
        to_resume("auto", run)


def test_never_overwrites_no_run(run):
    with pytest.raises(UserError, match="holds a run"):
        to_resume("never", run)
    assert to_resume("never", run.parent / "new") is None
    assert to_resume("auto", run.parent / "new") is None


def test_a_path_is_taken_or_refused_with_the_reason(run, tmp_path, monkeypatch):
    state = run / "checkpoints" / OLD / "state.ckpt"
    assert to_resume(str(state.parent), tmp_path / "other") == state
    (tmp_path / "good").symlink_to(state.parent)
    assert to_resume(str(tmp_path / "good"), tmp_path / "other") == state
    monkeypatch.chdir(run / "checkpoints")
    assert to_resume(OLD, tmp_path / "other") == state
    assert step_of(state) == 8
    cut(state, 7)
    with pytest.raises(UserError, match=r"not a whole checkpoint, state\.ckpt is truncated: 7 of 100 bytes; give "):
        to_resume(OLD, run)
    assert state.exists(), "what a person names is not moved"
    shutil.copytree(run / "checkpoints" / NEW, tmp_path / "renamed")
    with pytest.raises(UserError, match="renamed is not named step-NUMBER"):
        to_resume(str(tmp_path / "renamed"), run)


def test_a_line_that_is_started_again_goes_on_from_what_descends_from_the_one_it_names(run, tmp_path):
    old, new = (run / "checkpoints" / name for name in (OLD, NEW))
    rows = [{"start": 0}, {"begun": 8, "line": "a"}, {"start": 8}, {"begun": 8, "line": "b"}, {"end": 2}]
    (run / starts.STARTS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for line in ("", "b", "c"):
        assert to_resume(str(old), run, line=line) == old / "state.ckpt", "another line goes back"
    assert to_resume(str(old), run, line="a") == new / "state.ckpt"
    shutil.rmtree(old)
    assert to_resume(str(old), run, line="a") == new / "state.ckpt"
    with pytest.raises(UserError, match=f"{OLD}: no such checkpoint"):
        to_resume(str(old), run)
    (run / resume.ORIGIN).write_text(str(tmp_path / "gone" / "checkpoints" / OLD))
    assert to_resume(str(tmp_path / "gone" / "checkpoints" / OLD), run) == new / "state.ckpt"
    with pytest.raises(UserError, match="no such checkpoint"):
        to_resume(str(tmp_path / "gone" / "checkpoints" / NEW), run)
    later = run / "checkpoints" / "step-00000099"
    with pytest.raises(UserError, match="no such checkpoint"):  # nothing here descends from it
        to_resume(str(later), run, line="a")


@pytest.mark.parametrize("name", ["state.ckpt", "manifest.json"])
def test_what_may_not_be_read_is_not_taken_for_broken(name, run, monkeypatch):
    """The superuser may read all: what its system would answer another is put in its place."""
    closed, read_bytes, open_file = run / "checkpoints" / NEW / name, Path.read_bytes, Path.open

    def refuse(how):
        def read(path, *args, **options):
            if path == closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return how(path, *args, **options)

        return read

    monkeypatch.setattr(Path, "read_bytes", refuse(read_bytes))
    monkeypatch.setattr(Path, "open", refuse(open_file))
    for given in ("auto", "never", str(closed.parent)):
        with pytest.raises(UserError, match=f"{closed} may not be read; give this account the right to"):
            to_resume(given, run)
    assert closed.exists()


def test_a_newer_checkpoint_behind_a_symlink_is_told_and_not_passed_over(run, tmp_path):
    folder = run / "checkpoints" / NEW
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    told = f"checkpoints/{NEW} is a symbolic link and is not followed; move the folder back, or give resume=PATH"
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.69}\n')
    (run / resume.ORIGIN).write_text(str(save(tmp_path / "other", OLD)))
    for given in ("auto", str(tmp_path / "other" / "checkpoints" / OLD)):  # a job begun from another run's
        with pytest.raises(UserError, match=told):
            to_resume(given, run)
    old = run / "checkpoints" / OLD
    assert to_resume(str(old), run) == old / "state.ckpt"
    resume.undo_later(run, 8)
    assert to_resume("auto", run) == old / "state.ckpt"
    old.rename(tmp_path / "old")
    assert resume.links(run / "checkpoints") == []
    old.symlink_to(tmp_path / "gone")  # a disk that is not mounted
    with pytest.raises(UserError, match=f"checkpoints/{OLD} is a symbolic link"):
        to_resume("auto", run)


@pytest.mark.parametrize("behind", ["run", "run/checkpoints"])
def test_a_path_into_its_own_run_is_known_behind_a_symlink(behind, run, tmp_path):
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.69}\n')
    place = tmp_path / behind
    place.rename(tmp_path / "real")
    place.symlink_to(tmp_path / "real")
    for given in (run / "checkpoints" / OLD, (run / "checkpoints" / OLD).resolve()):
        assert to_resume(str(given), run) == run / "checkpoints" / OLD / "state.ckpt"


CONFIG = {
    "seed": 42,
    "run_dir": "runs/a",
    "resume": "auto",
    "logger": {"_target_": "wandb_logger", "project": "p", "tags": []},
    "callbacks": {},
    "samples": {"count": 3},
    "loss": {"_target_": "dpo", "beta": 0.1},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.999]},
    "lora": {"_target_": "add", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "data": {"path": "a.jsonl", "val_path": None, "batch_size": 8, "layout": "shared", "val_fraction": 0.15},
    "model": {"name": "m", "note": None, "gradient_checkpointing": False},
    "trainer": {
        "precision": "bf16-mixed", "max_steps": 10, "limit_train_batches": 1.0, "accumulate_grad_batches": 1,
        "devices": 1,
    },
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    """Return CONFIG with other values; __ stands for the dot."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in values.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def test_an_equal_configuration_may_go_on():
    compare_config(CONFIG, changed(), [])


@pytest.mark.parametrize(
    "values",
    [
        {"run_dir": "b", "resume": "runs/a/checkpoints/step-00000012", "resume_allow": []},
        {"logger": {"_target_": "no_logger"}, "callbacks": {"x": {"_target_": "y"}}, "samples__count": 0},
        {"trainer__max_steps": 20, "trainer__max_time": "00:01:00:00", "trainer__log_every_n_steps": 5},
        {"trainer__devices": 2, "data__batch_size": 4, "trainer__accumulate_grad_batches": 1},
        {"strategy": {"name": "zero2"}, "reference": {"mode": "cached"}, "model__gradient_checkpointing": True},
        {"model__note": "a note", "model__base_model": "b", "trusted_targets": ["x"], "export": {"merge": True}},
    ],
)
def test_what_changes_no_training_may_change(values):
    compare_config(CONFIG, changed(**values), [])
    compare_config(changed(**values), CONFIG, [])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"loss__beta": 0.2}, "loss.beta: 0.1 in the checkpoint, 0.2 now"),
        ({"loss__label_smoothing": 0.1}, "loss.label_smoothing: absent in the checkpoint, 0.1 now"),
        ({"seed": 43}, "seed: 42 in the checkpoint, 43 now"),
        ({"optim__betas": [0.9, 0.95]}, "optim.betas: [0.9, 0.999] in the checkpoint, [0.9, 0.95] now"),
        ({"data__path": "b.jsonl"}, 'data.path: "a.jsonl" in the checkpoint, "b.jsonl" now'),
        ({"data__val_path": "v.jsonl"}, 'data.val_path: null in the checkpoint, "v.jsonl" now'),
        ({"data__val_fraction": 0.1}, "data.val_fraction: 0.15 in the checkpoint, 0.1 now"),
        ({"data__layout": "padded"}, 'data.layout: "shared" in the checkpoint, "padded" now'),
        ({"trainer__precision": "32-true"}, 'trainer.precision: "bf16-mixed" in the checkpoint, "32-true" now'),
        # one batch, where it was all of them
        ({"trainer__limit_train_batches": 1}, "trainer.limit_train_batches: 1.0 in the checkpoint, 1 now"),
        ({"lora__lora_dropout": 0.1}, "lora.lora_dropout: 0.0 in the checkpoint, 0.1 now"),
        ({"lora__lora_alpha": 16}, "lora.lora_alpha: 32 in the checkpoint, 16 now"),
        ({"loggers": 1}, "loggers: absent in the checkpoint, 1 now"),  # no key of the group logger
    ],
)
def test_what_changes_the_training_is_refused_unless_it_is_allowed(values, line):
    key = line.partition(":")[0]
    remedy = f"; give the old value, or resume_allow=[{key}] to change it on purpose"
    with pytest.raises(UserError, match=f"^{re.escape(line + remedy)}$"):
        compare_config(CONFIG, changed(**values), [])
    compare_config(CONFIG, changed(**values), [key])
    compare_config(CONFIG, changed(**values), ["optim.nothing", key.partition(".")[0]])


@pytest.mark.parametrize(
    "values",
    [
        {"lora__r": 8},
        {"lora__target_modules": ["q_proj"]},
        {"lora": {"_target_": "no"}},
        {"model__dimensions": {"hidden_size": 32}},
    ],
)
def test_what_changes_the_shape_of_what_trains_is_never_allowed(values):
    """Told of every key, either way round, and no word of resume_allow=[KEY]."""
    for then, now in ((CONFIG, changed(**values)), (changed(**values), CONFIG)):
        for allow in ([], ["lora", "model", "optim"], ["lora.r", "model.dimensions.hidden_size"]):
            with pytest.raises(UserError) as error:
                compare_config(then, now, allow)
            lines = str(error.value).splitlines()
            assert len(lines) == (5 if values.get("lora") else 1)
            for line in lines:
                assert line.startswith(("lora.", "model.")) and "resume_allow=" not in line
                assert line.endswith("give the old value, or begin another run: resume=never with another run_dir")


def test_a_model_that_was_moved_can_be_named():
    with pytest.raises(UserError, match=r"resume_allow=\[model\.name\] to change it on purpose"):
        compare_config(CONFIG, changed(model__name="n"), [])
    compare_config(CONFIG, changed(model__name="n"), ["model.name"])


def test_a_key_that_is_gone_is_a_change_and_every_change_has_its_line():
    now = changed(seed=1, samples__count=1)
    del now["loss"]["beta"]
    with pytest.raises(UserError) as error:
        compare_config(CONFIG, now, ["data"])
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == ["seed", "loss.beta"]
    assert "loss.beta: 0.1 in the checkpoint, absent now" in str(error.value)
    with pytest.raises(UserError, match=r"^loss\.beta: ") as error:
        compare_config(CONFIG, now, ["seed", "loss.bet"])  # a prefix of a name is no group


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_and_one_that_has_ended_does_not(
    tmp_path, capsys
):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.69}\n')
    (tmp_path / "run_id").write_text("a")
    assert to_resume("auto", tmp_path) is None
    assert "starts anew" in capsys.readouterr().out
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="holds a run"):
        to_resume("auto", tmp_path)
