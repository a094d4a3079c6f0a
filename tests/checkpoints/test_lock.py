"""Two processes never train in one run folder."""

import errno
import os
import signal
import subprocess
import sys

import lightning.pytorch as pl
import pytest

from dpo_lightning.checkpoints import lock
from dpo_lightning.checkpoints.starts import read
from dpo_lightning.types import UserError
from tests.ranks import ROOT, TINY

HOLD = """
import sys, time
from pathlib import Path
from dpo_lightning.checkpoints import lock
lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def other(run_dir, seconds):
    """Start a process that holds the lock of a folder for a while."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_one_process_until_that_ends_however(tmp_path, cli, capsys):
    holder = other(tmp_path, 999)
    assert cli(*TINY, "trainer.max_steps=1", f"run_dir={tmp_path}") == 2
    assert f"error: run_dir={tmp_path}: process {holder.pid} on " in capsys.readouterr().err
    assert cli("check", *TINY, f"run_dir={tmp_path}") == 0
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert cli(*TINY, "trainer.max_steps=1", f"run_dir={tmp_path}") == 0
    other(tmp_path, 0).communicate()  # a run that has ended holds nothing


class Intruder(pl.Callback):
    """Another process that would train in the folder, when training has begun."""

    def on_train_start(self, trainer, pl_module):
        command = [sys.executable, "-c", HOLD, trainer.default_root_dir, "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"process {os.getpid()} on " in done.stderr


def test_a_run_that_has_made_its_folder_holds_it(tmp_path, cli):
    target = "tests.checkpoints.test_lock.Intruder"
    intruder = [f"+callbacks.intruder._target_={target}", f"trusted_targets=[{target}]"]
    assert cli(*TINY, *intruder, "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}") == 0


class Faster(pl.Callback):
    """Another process that makes the folder and trains in it, when this one has found none there."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "dpo_lightning", *TINY, "trainer.max_steps=2", f"run_dir={folder}"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


def test_a_run_that_was_made_since_it_was_looked_for_is_left_alone(tmp_path, cli, metrics, capsys):
    target, run = "tests.checkpoints.test_lock.Faster", tmp_path / "run"
    faster = [f"+callbacks.faster._target_={target}", f"+callbacks.faster.folder={run}", f"trusted_targets=[{target}]"]
    assert cli(*TINY, *faster, "trainer.max_steps=1", f"run_dir={run}") == 2
    assert f"run_dir={run}: another process has trained there meanwhile; start again" in capsys.readouterr().err
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert [row["end"] for row in read(run) if "end" in row] == [0]


def test_a_disk_that_takes_no_word_of_who_holds_it_is_no_obstacle(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    lock.take(tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", HOLD, str(tmp_path), "0"], cwd=ROOT, capture_output=True, check=True)
    lock.let_go(tmp_path)
    other(tmp_path, 0).communicate()


def test_a_job_that_is_started_again_waits_for_its_own_last_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    holder = other(tmp_path, 2)
    lock.take(tmp_path)
    lock.let_go(tmp_path)
    holder.communicate()
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    holder = other(tmp_path, 999)
    with pytest.raises(UserError, match="trains there; wait for its end"):
        lock.take(tmp_path)
    holder.kill()
    holder.communicate()
