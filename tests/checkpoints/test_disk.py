"""A disk that is really full, or read-only: a small file system of its own, mounted in a namespace of its own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from tests.ranks import ROOT, TINY, environment, fault, run_ranks

UNSHARE = ["unshare", "--map-root-user", "--mount"]
MOUNT = 'mount -t tmpfs -o "$0" none "$1" && shift && exec "$@"'
WORDS = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true", "data.max_pairs=60",
    "data.batch_size=4", "trainer.num_sanity_val_steps=0", "trainer.limit_val_batches=0", "trainer.max_steps=12",
    "trainer.max_epochs=2", "checkpoint.every_n_steps=2", "checkpoint.keep_last=null", "trainer.accelerator=cpu",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this machine lets nobody mount a file system of his own",
)


class Ballast(pl.Callback):
    """Fills the disk when a step has ended, and frees it when another has."""

    def __init__(self, file: str, fill: int, free: int | None):
        self.file, self.fill, self.free = Path(file), fill, free

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        saver: Any = trainer.strategy.checkpoint_io
        saver.finish()  # what was begun before is not what the disk is full for
        if trainer.global_step == self.fill:
            with self.file.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while file.write(bytes(4096)):
                    pass
        if trainer.global_step == self.free:
            self.file.unlink()


def on_a_disk(options: str, disk: Path, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    disk.mkdir()
    words = [*UNSHARE, "bash", "-c", MOUNT, options, str(disk), *command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=480, cwd=ROOT, **more)


def test_a_full_disk_costs_checkpoints_and_then_the_run_and_never_what_is_saved(tmp_path, cache):
    disk = tmp_path / "disk"
    done = on_a_disk("size=8m", disk, sys.executable, __file__, str(disk), env=environment(cache, LOCAL_RANK="0"))
    assert done.returncode == 0, done.stdout + done.stderr
    freed, full, again = json.loads(done.stdout.splitlines()[-1])

    assert freed["code"] == 0
    assert freed["checkpoints"] == [[step, None] for step in (2, 4, 10, 12)]
    assert freed["steps"] == [*range(1, 13)]
    for line in ("checkpoint 6 cannot be saved: [Errno 28] No space left", "checkpoint 8 cannot be saved: [Errno 28]",
                 "checkpoint 10 is saved, after 2 that were not"):  # fmt: skip
        assert line in done.stdout

    assert full["code"] == 5
    assert full["checkpoints"] == [[2, None], [4, None]]
    assert full["steps"][:5] == [1, 2, 3, 4, 5] and full["exported"] is False
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "3 checkpoints in a row could not be saved; free space" in error
    assert error.endswith("it goes on from step-00000004") and "Traceback" not in done.stderr

    assert again["code"] == 0 and again["exported"] is True
    assert again["checkpoints"] == [[step, None] for step in range(2, 13, 2)]
    assert again["steps"] == [*range(1, 13)]
    assert freed["leftovers"] == full["leftovers"] == again["leftovers"] == []


def test_a_folder_that_is_read_only_is_refused_before_anything_is_loaded(tmp_path):
    disk = tmp_path / "disk"
    command = [sys.executable, "-X", "importtime", "-m", "dpo_lightning", *WORDS, f"run_dir={disk / 'run'}"]
    done = on_a_disk("ro", disk, *command)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert told == [f"error: run_dir={disk / 'run'}: {disk} is not a folder that may be written; choose another"], (
        shlex.join(command)
    )
    assert "hydra" in imported and not imported & {"torch", "lightning", "transformers"}


@pytest.mark.parametrize(("options", "why"), [("ro", "Read-only file system"), ("size=40k", "No space left on device")])
def test_a_cache_that_cannot_be_written_is_one_line(options, why, tmp_path):
    disk = tmp_path / "disk"
    command = [sys.executable, "-m", "dpo_lightning", "check", *WORDS]
    done = on_a_disk(options, disk, *command, env=environment(disk, LOCAL_RANK="0"))
    told = [line for line in done.stderr.splitlines() if not line.startswith("Generating")]
    remedy = "free space or set DPO_LIGHTNING_CACHE to another folder"
    assert done.returncode == 2, done.stdout + done.stderr
    assert told == [f"error: the cache {disk} cannot be written ({why}); {remedy}"]


def test_a_model_that_the_cache_has_no_room_for_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    words = [*WORDS, "model.dimensions.hidden_size=256", f"run_dir={tmp_path / 'run'}"]  # 3 MB of weights
    command = [sys.executable, "-m", "dpo_lightning", *words]
    done = on_a_disk("size=1m", disk, *command, env=environment(disk, LOCAL_RANK="0"))
    assert done.returncode == 2, done.stdout + done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: the cache {disk} cannot be written (") and "No space left on device" in error
    assert error.endswith("; free space or set DPO_LIGHTNING_CACHE to another folder")
    assert "Traceback" not in done.stderr


def test_a_folder_that_turns_out_unwritable_is_one_line_too(tmp_path, cli, capsys):
    run = tmp_path / "run"
    (run / "config.yaml").mkdir(parents=True)  # what the first file written meets
    assert cli(*WORDS, f"run_dir={run}") == 2
    assert f"error: run_dir={run}: cannot be written ([Errno 21] Is a directory" in capsys.readouterr().err


def test_all_ranks_end_with_one_code(tmp_path, cache):
    """The first rank alone writes, and the others would wait for it."""
    words = [*TINY, "trainer.devices=2", "strategy=ddp", "data.batch_size=2", "trainer.max_epochs=3",
             "checkpoint.every_n_steps=1", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    for output in run_ranks([[*words, *fault("at=save.before_manifest;do=enospc")]], cache, code=5):
        # the fourth is begun where the next step ends before the third is refused
        assert re.search(r"[34] checkpoints in a row could not be saved", output)


class Preempted(pl.Callback):
    """Signals the second rank in its second step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_run_that_cannot_be_saved_where_it_is_stopped_is_not_said_to_be(tmp_path, cache):
    target = "tests.checkpoints.test_disk.Preempted"
    words = [*TINY, "trainer.devices=2", "strategy=ddp", "data.batch_size=2", f"run_dir={tmp_path / 'run'}",
             f"+callbacks.preempted._target_={target}", f"trusted_targets=[{target}]"]  # fmt: skip
    for output in run_ranks([[*words, *fault("at=save.before_manifest;do=enospc")]], cache, code=5):
        assert "since its last checkpoint could not be saved; free space or quota and start the run again" in output
    assert '"end": 5' in (tmp_path / "run" / "starts.jsonl").read_text()


def test_a_disk_that_is_full_when_weights_are_exported_is_one_line(tmp_path, cli, capsys, monkeypatch):
    def full(self: Any, folder: str, **options: Any) -> None:
        Path(folder).mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    run = tmp_path / "run"
    assert cli(*TINY, "trainer.max_steps=1", f"run_dir={run}") == 5
    assert f"error: {run}: cannot be exported (Error while serializing" in capsys.readouterr().err
    assert not list(run.glob(".adapter-*"))


def test_a_disk_that_is_full_when_an_adapter_is_merged_is_one_line(tmp_path, cli, capsys, monkeypatch):
    def full(self: Any, folder: str, **options: Any) -> None:
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    assert cli(*TINY, "export.hub_id=somebody/plain-talker", "trainer.max_steps=1", f"run_dir={run}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert cli("export", f"run_dir={run}", "export.merge=true") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: run_dir={run}: the model cannot be written ([Errno 28] No space left on device)")
    assert not (run / "model").exists() and not list(run.glob(".model-*"))
    assert cli("export", f"run_dir={run}", "export.merge=true") == 0
    assert (run / "model" / "README.md").read_text().count('.from_pretrained("somebody/plain-talker")\n') == 2


def main(disk: Path) -> list[dict[str, Any]]:
    """Train on a disk that is full for a while, on one that stays full, and there again when it is freed."""
    from dpo_lightning.checkpoints.folder import published, step_number, verify
    from tests.ranks import main as run

    found = []
    for name, fill, free in (("freed", 5, 9), ("full", 5, -1), ("full", -1, -1)):
        ballast = disk / "ballast"
        ballast.unlink(missing_ok=True)
        callback = {"_target_": "tests.checkpoints.test_disk.Ballast", "file": ballast, "fill": fill, "free": free}
        words = [f"+callbacks.ballast.{key}={value}" for key, value in callback.items()]
        trusted = f"trusted_targets=[{callback['_target_']}]"
        (code,) = run([[*WORDS, *words, trusted, f"run_dir={disk / name}"]])
        checkpoints = disk / name / "checkpoints"
        rows = (disk / name / "metrics.jsonl").read_text().splitlines()
        found.append({
            "code": code, "exported": (disk / name / "adapter" / "adapter_model.safetensors").exists(),
            "checkpoints": [[step_number(folder), verify(folder)] for folder in published(checkpoints)[::-1]],
            "leftovers": [path.name for path in checkpoints.iterdir() if not path.name.startswith("step-")],
            "steps": [row["step"] for row in map(json.loads, rows) if "train/loss" in row],
        })  # fmt: skip
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(main(Path(sys.argv[1]))), flush=True)
