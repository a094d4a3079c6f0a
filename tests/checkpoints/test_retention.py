"""Old checkpoints go, and never the only good one: random histories of saves, crashes, damage, pins and restarts."""

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dpo_lightning.checkpoints import retention
from dpo_lightning.checkpoints.folder import published, step_number, verify
from dpo_lightning.checkpoints.resume import newest
from dpo_lightning.checkpoints.retention import PIN, Verified, best_step, retain
from dpo_lightning.checkpoints.writer import Disk, publish, sweep


class Crash(BaseException):
    """The process is dead."""


class Mortal(Disk):
    """Does so many operations and no more: a killed process tidies nothing up. Fsyncs nothing, for speed."""

    def __init__(self, operations: int | None = None):
        self.left = operations

    def alive(self) -> None:
        if self.left == 0:
            raise Crash
        if self.left is not None:
            self.left -= 1

    def mkdir(self, folder):
        self.alive()
        super().mkdir(folder)

    def write(self, stream, data):
        self.alive()
        super().write(stream, data)

    def fsync(self, stream):
        self.alive()

    def rename(self, old, new):
        self.alive()
        super().rename(old, new)

    def unlink(self, file):
        self.alive()
        super().unlink(file)

    def rmdir(self, folder):
        self.alive()
        super().rmdir(folder)

    def fsync_dir(self, folder):
        self.alive()


def save(run: Path, step: int, disk: Disk | None = None) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = {name: (lambda stream: stream.write(os.urandom(30))) for name in ("state.ckpt", "config.json")}
    publish(folder, files, {"step": step}, disk or Mortal())
    return folder


def validated(run: Path, **losses: float) -> None:
    rows = [{"step": int(step[1:]), "val/loss": loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(folders: list[Path]) -> list[int | None]:
    return [step_number(folder) for folder in folders]


def there(run: Path) -> list[int | None]:
    return steps(published(run / "checkpoints"))


class History:
    """A run's folder, and what is done to it."""

    def __init__(self, run: Path, seed: int, is_whole: Callable[[Path], bool] | None = None):
        self.run, self.checkpoints, self.random = run, run / "checkpoints", random.Random(seed)
        self.step, self.keep_last, self.is_whole = 0, 2, is_whole or Verified()
        self.canary = run / "elsewhere" / "file"
        self.canary.parent.mkdir()
        self.canary.write_text("alive")
        self.checkpoints.mkdir()
        self.link = self.checkpoints / "step-99999999"
        self.link.symlink_to(self.canary.parent)

    def whole(self) -> set[Path]:
        return {folder for folder in published(self.checkpoints) if verify(folder) is None}

    def protected(self) -> set[Path]:
        folders = published(self.checkpoints)
        best = best_step(self.run)
        return {folder for folder in folders if (folder / PIN).exists() or step_number(folder) == best}

    def save(self, disk: Disk) -> None:
        self.step += self.random.randint(1, 3)
        save(self.run, self.step, disk)
        if self.random.random() < 0.2:
            with (self.run / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": self.step, "val/loss": self.random.random()}) + "\n")

    def retain(self, disk: Disk) -> None:
        """Delete, and hold what a retention that was not cut short promises."""
        before, protected = set(published(self.checkpoints)), self.protected()
        removed = retain(self.checkpoints, self.keep_last, best_step(self.run), disk, is_whole=self.is_whole)
        after = set(published(self.checkpoints))
        assert before - after == set(removed)
        assert protected <= after
        if after and verify(max(after)) is None:
            assert len(self.whole() - protected) <= self.keep_last
        else:
            assert not removed

    def restart(self) -> None:
        """Go on from the newest, as a run that starts does."""
        whole = self.whole()
        sweep(self.checkpoints)
        assert not list(self.checkpoints.glob(".step-*"))
        state = newest(self.run)
        assert (state.parent if state else None) == max(whole, default=None)
        self.step = (state and step_number(state.parent)) or 0

    def crash(self) -> None:
        """Save and delete on a disk that dies at any one operation, and start again."""
        disk = Mortal(self.random.randint(0, 22))
        with suppress(Crash):
            self.save(disk)
            self.retain(disk)
        self.restart()

    def damage(self) -> None:
        """Cut, change or remove a file of one checkpoint, often the newest, or lead it elsewhere."""
        if folders := published(self.checkpoints):
            folder = self.random.choice([folders[0], self.random.choice(folders)])
            file = folder / self.random.choice(["state.ckpt", "manifest.json"])
            how = self.random.choice(["cut", "changed", "gone", "link"])
            data = file.read_bytes() if file.is_file() else b""
            file.unlink(missing_ok=True)
            if how == "cut":
                file.write_bytes(data[:-1])
            elif how == "changed":
                file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if data else b"?")
            elif how == "link":
                file.symlink_to(self.canary.parent)

    def pin(self) -> None:
        if folders := published(self.checkpoints):
            (self.random.choice(folders) / PIN).touch()

    def keep(self) -> None:
        self.keep_last = self.random.randint(1, 3)
        self.retain(Mortal())

    def change(self) -> None:
        """Do any one thing, and hold what is promised after each."""
        before = self.whole()
        match self.random.choice([*["save", "crash", "damage", "keep"] * 2, "pin", "restart"]):
            case "save":
                self.save(Mortal())
                self.retain(Mortal())
            case "crash":
                self.crash()
            case "damage":
                self.damage()
                before = self.whole()  # what the damage took was no deletion of ours
                self.keep()
            case "pin":
                self.pin()
            case "restart":
                self.restart()
            case "keep":
                self.keep()
        assert not before or self.whole(), "there was a good checkpoint, and there is none"
        assert self.link.is_symlink() and self.canary.read_text() == "alive"


@pytest.mark.parametrize("seed", range(20))
def test_no_history_loses_the_only_good_checkpoint_or_keeps_too_many(seed, tmp_path):
    history = History(tmp_path, seed)
    for _ in range(30):
        history.change()


def test_the_histories_bite(tmp_path):
    """A retention that goes by names alone loses the only good checkpoint in some of them."""
    lost = 0
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        history = History(tmp_path / str(seed), seed, is_whole=lambda folder: True)
        try:
            for _ in range(30):
                history.change()
        except AssertionError:
            lost += 1
    assert lost >= 5


def test_the_newest_the_best_and_the_pinned_stay(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000001" / PIN).touch()
    validated(tmp_path, s3=0.2, s4=0.1, s5=0.3, s99=0.01)
    assert best_step(tmp_path) == 4
    points: list[str] = []
    removed = retain(tmp_path / "checkpoints", 2, 4, Mortal(), points.append)
    assert steps(removed) == [5, 3, 2]
    assert points == ["retain.before_delete"] * 3
    assert there(tmp_path) == [7, 6, 4, 1]
    assert retain(tmp_path / "checkpoints", 2, 4, Mortal()) == []


def test_nothing_is_deleted_by_default(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step)
    assert retain(tmp_path / "checkpoints", None, None) == []
    assert retain(tmp_path / "none", 1, None) == []
    assert there(tmp_path) == [3, 2, 1]


def test_nothing_is_deleted_while_the_newest_is_broken(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000003" / "state.ckpt").unlink()
    assert retain(tmp_path / "checkpoints", 1, None) == []
    assert there(tmp_path) == [3, 2, 1]


def test_a_broken_one_does_not_count(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000004" / "state.ckpt").unlink()
    assert steps(retain(tmp_path / "checkpoints", 2, None)) == [2, 1]
    assert there(tmp_path) == [5, 4, 3]


def test_a_deletion_cut_short_leaves_no_half_of_a_checkpoint(tmp_path):
    for operations in range(20):
        run = tmp_path / str(operations)
        run.mkdir()
        for step in range(1, 4):
            save(run, step)
        with suppress(Crash):
            retain(run / "checkpoints", 1, None, Mortal(operations))
        assert all(verify(folder) is None for folder in published(run / "checkpoints"))
        sweep(run / "checkpoints")
        assert len(list((run / "checkpoints").iterdir())) == len(there(run))
    assert there(run) == [3]


def test_a_checkpoint_is_hashed_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    hashed = []

    def verify_and_count(folder):
        hashed.append(folder)
        return verify(folder)

    monkeypatch.setattr(retention, "verify", verify_and_count)
    folder, is_whole = save(tmp_path, 1), Verified()
    assert is_whole(folder) and is_whole(folder)
    (folder / PIN).touch()
    assert is_whole(folder)
    assert len(hashed) == 1
    state = folder / "state.ckpt"
    state.write_bytes(bytes([state.read_bytes()[0] ^ 1]) + state.read_bytes()[1:])
    assert not is_whole(folder) and not is_whole(folder)
    assert len(hashed) == 2


def test_the_best_is_that_of_the_checkpoints_there_are(tmp_path):
    assert best_step(tmp_path) is None
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert best_step(tmp_path) is None
    validated(tmp_path, s1=0.01, s2=0.5, s4=float("nan"), s6=0.7)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "train/loss": 0.0}\n[]\n{"step": 6, "val/lo')
    assert best_step(tmp_path) == 2
