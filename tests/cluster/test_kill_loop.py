"""Killed at any instant, also inside a save, a run on two ranks goes on, and ends with the bits of one never killed."""

import os
import subprocess
import sys

import pytest

from tests.ranks import environment, rows, trace

KILLS = int(os.environ.get("DPO_LIGHTNING_KILLS", "12"))  # `make soak` asks for 200


@pytest.mark.timeout(30 * KILLS + 300)
def test_a_run_survives_being_killed_at_any_instant(tmp_path, cache):
    steps = 6 * KILLS  # a life goes on for three steps or so, five at most
    command = [sys.executable, "-m", "tests.kill_loop", str(tmp_path), str(KILLS), "1", str(steps)]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lives = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lives) == KILLS
    assert sum("at=save" in line or "at=retain" in line for line in lives) == KILLS // 2
    golden, run = tmp_path / "golden", tmp_path / "run"
    for rank in (0, 1):
        assert [*trace(run, rank)] == [*range(1, steps + 1)]
        assert trace(run, rank) == trace(golden, rank)
    assert rows(run) == rows(golden)
    files = [each / "adapter" / "adapter_model.safetensors" for each in (golden, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    kept = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (golden, run)]
    assert kept[0] == kept[1], "nothing half-written, nothing broken is left"
