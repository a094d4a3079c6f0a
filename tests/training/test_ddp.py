"""Two real ranks give one process's numbers at equal global batch."""

import os
import subprocess
import sys

import pytest


def test_two_ranks_equal_one_process(cli, metrics, tmp_path, cache):
    words = ["model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true"]
    words += ["trainer.max_steps=3", "trainer.accelerator=cpu", "trainer.limit_val_batches=2"]
    assert cli(*words, "data.batch_size=8", f"run_dir={tmp_path / 'one'}") == 0
    two = [*words, "data.batch_size=4", "trainer.devices=2", "strategy=ddp", f"run_dir={tmp_path / 'two'}"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_lightning", *two], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "DPO_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = ([r for r in metrics(tmp_path / n) if "train/loss" in r] for n in ("two", "one"))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/rewards/margins", "train/logps/chosen"):
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-5), key
    assert (tmp_path / "two" / "adapter").is_dir()
