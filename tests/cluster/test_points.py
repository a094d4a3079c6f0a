"""A run passes each of its named points; and a fault that is mistyped is an error, not a test that passes."""

import json
import subprocess
import sys

import pytest

from dpo_lightning.cluster import points
from tests.ranks import TINY, environment

WORDS = [*TINY, "data.batch_size=4", "reference=cached", "checkpoint.every_n_steps=2", "checkpoint.keep_last=1"]


RECORD = """
import json, sys
from dpo_lightning.__main__ import main
from dpo_lightning.cluster import points
passed, due = set(), points._due
points._due = lambda point, step: passed.add(point) or due(point, step)
for run in sys.argv[1].split("|"):
    sys.argv[1:] = run.split()
    try:
        main()
    except SystemExit as done:
        assert not done.code
print(json.dumps(sorted(passed)))
"""


def test_every_point_is_passed_by_a_run_that_is_resumed(tmp_path, cache):
    words = " ".join([*WORDS, f"run_dir={tmp_path / 'run'}"])
    runs = f"{words} trainer.max_steps=4|{words} trainer.max_steps=5"
    done = subprocess.run(
        [sys.executable, "-c", RECORD, runs], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {*json.loads(done.stdout.splitlines()[-1])} == points.POINTS - {"launch"}  # where ranks are started


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at=step.bgin;do=raise", "no point step.bgin"),
        ("at=step.begin;do=rise", "no action rise"),
        ("at=step.begin;do=raise;stp=3", "unknown stp"),
        ("at=step.begin;do=nan", "go with gradient and loss"),
        ("at=loss;do=raise", "go with gradient and loss"),
    ],
)
def test_a_mistyped_fault_is_an_error(monkeypatch, text, told):
    monkeypatch.setenv(points.FAULT, text)
    monkeypatch.setenv(points.ALLOW, "1")
    with pytest.raises(ValueError, match=told):
        points.at("step.begin", 1)


def test_a_fault_needs_leave(monkeypatch):
    monkeypatch.setenv(points.FAULT, "at=step.begin;do=raise")
    monkeypatch.delenv(points.ALLOW, raising=False)
    with pytest.raises(ValueError, match="faults are for tests"):
        points.at("step.begin", 1)
