"""A rank that is killed, hangs or crashes ends the run in bounded time, is named, and leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest

from dpo_lightning.checkpoints.resume import to_resume
from dpo_lightning.cluster import watchdog
from dpo_lightning.cluster.signs import Sign, behind, slow
from dpo_lightning.cluster.watchdog import Watchdog
from dpo_lightning.data.batches import PairTable
from tests.nursery import nursery
from tests.ranks import TINY, environment, environments, fault, run_ranks

WORDS = [
    *TINY, "trainer.max_epochs=-1", "trainer.max_steps=6", "data.batch_size=4", "trainer.devices=2",
    "checkpoint.every_n_steps=1",
]  # fmt: skip
LOST = 4


def children_of(text: str) -> list[str]:
    """Return the processes whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            found += [command] if text in command else []
    return found


def run(run_dir: Path, cache: Path, fault: str, *words: str) -> tuple[int, str, float]:
    """Run two ranks that Lightning starts, with a fault; return code, output and seconds."""
    env = environment(cache, DPO_LIGHTNING_FAULT=fault, DPO_LIGHTNING_ALLOW_FAULTS="1")
    began = time.monotonic()
    command = [sys.executable, "-m", "dpo_lightning", *WORDS, *words, f"run_dir={run_dir}"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, output, time.monotonic() - began


@pytest.mark.parametrize(
    ("fault", "words", "told"),
    [
        ("at=backward.begin;do=SIGKILL;rank=1;step=3", ["strategy=ddp"], "rank 1 (pid"),
        ("at=step.begin;do=SIGSTOP;rank=1;step=3", ["strategy=zero2", "cluster.hang_seconds=10"], "rank 1 ("),
    ],
    ids=["killed", "stopped"],
)
def test_a_rank_that_is_gone_or_hangs_is_named_and_the_run_ends(tmp_path, cache, fault, words, told):
    run_dir = tmp_path / "run"
    code, output, seconds = run(run_dir, cache, fault, *words)
    assert code == LOST, output
    assert told in output, output
    assert "goes on from its last checkpoint" in output
    if "hang" in str(words):
        assert "after" in output
        assert "most recent call first" in output  # the stacks
        assert seconds < 90
    assert to_resume("auto", run_dir) is not None
    time.sleep(1)
    assert children_of(str(run_dir)) == []


def run_alone(run_dir: Path, cache: Path, fault: str, *words: str) -> list[tuple[int, str]]:
    """Run two ranks, each started by itself as srun does, with a fault; return exit code and output of each."""
    env = environment(cache, DPO_LIGHTNING_FAULT=fault, DPO_LIGHTNING_ALLOW_FAULTS="1")
    return nursery().run([[*WORDS, *words, f"run_dir={run_dir}"]], environments(env, 2), timeout=90)


def test_ranks_that_nobody_has_started_for_the_other_end_when_one_hangs(tmp_path, cache):
    words = ["strategy=ddp", "cluster.hang_seconds=10"]
    ended = run_alone(tmp_path / "run", cache, "at=update.begin;do=sleep:999;rank=1;step=3", *words)
    for code, output in ended:
        assert code == LOST, output
        assert "after" in output and "rank 1 (" in output and "goes on from its last checkpoint" in output
        assert "most recent call first" in output  # the stacks
    assert to_resume("auto", tmp_path / "run") is not None


@pytest.mark.parametrize(
    ("killed", "point", "told"),
    [
        (1, "save.gather", "rank 1 ("),
        (0, "step.begin", "rank 0 cannot be reached any more"),  # the store of the signs goes with it
    ],
)
def test_the_rank_that_is_left_names_the_one_that_is_killed(tmp_path, cache, killed, point, told):
    fault = f"at={point};do=SIGKILL;rank={killed};step=3"
    ended = run_alone(tmp_path / "run", cache, fault, "strategy=zero2")
    _, output = ended[1 - killed]
    assert ended[killed][0] == -signal.SIGKILL
    assert output.splitlines()[-1] == f"[{LOST}]", output
    assert told in output and "goes on from its last checkpoint" in output
    assert to_resume("auto", tmp_path / "run") is not None


def test_one_rank_that_crashes_ends_the_run_with_its_own_words(tmp_path, cache):
    code, output, _ = run(tmp_path / "run", cache, "at=step.begin;do=raise;rank=1;step=2", "strategy=ddp")
    assert code == LOST, output
    assert "the fault that was asked for at step.begin" in output
    assert "rank 1 (pid" in output, output


class LookOften(pl.Callback):
    """Has the watchdog look for slow ranks once a second."""

    def __init__(self):
        watchdog.LOOK = 0.0


class SlowDisk(LookOften):
    """Has the second rank wait for its data, too."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            read = PairTable.__getitem__
            PairTable.__getitem__ = lambda self, micro: (time.sleep(0.4), read(self, micro))[1]


def looked_at(run_dir: Path, steps: int, by: type[LookOften] = LookOften) -> list[str]:
    """Return the words of a run whose ranks are looked at all the time."""
    target = f"tests.cluster.test_lost_ranks.{by.__name__}"
    return [
        *WORDS[:-1], f"trainer.max_steps={steps}", f"run_dir={run_dir}", f"+callbacks.often._target_={target}",
        f"trusted_targets=[{target}]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "phase", "by", "words"),
    [
        ("ddp", "forward pass", LookOften, fault("at=forward;do=sleep:0.4;rank=1")),
        ("zero3", "forward pass", LookOften, fault("at=forward;do=sleep:0.4;rank=1")),
        ("zero2", "data", SlowDisk, []),
    ],
    ids=["forward", "before a sharded forward", "data"],
)
def test_a_rank_that_is_slow_in_each_step_is_told_of_once(tmp_path, cache, strategy, phase, by, words):
    run = [*looked_at(tmp_path / "run", 18, by), f"strategy={strategy}", *words]
    first, second = run_ranks([run], cache)
    assert second.count("is slow") == 0
    (line,) = (line for line in first.splitlines() if "is slow" in line)
    told = re.fullmatch(
        r"warning: rank 1 \(.+\) is slow: data and forward pass take it ([0-9.]+) s a step, most of it the (.+); "
        r"the other ranks ([0-9.]+) s, and they wait for it", line,
    )  # fmt: skip
    assert told and told[2] == phase
    assert float(told[1]) > 0.4 > float(told[3])


def test_in_200_clean_steps_no_rank_is_slow(tmp_path, cache):
    outputs = run_ranks([[*looked_at(tmp_path / "run", steps=200), "strategy=ddp"]], cache)
    assert "is slow" not in "".join(outputs)


def sign(rank: int, **changes) -> Sign:
    return Sign(rank, "node", 100 + rank, 9, "backward.begin", 4, 3, 60.0, 0.1, "data")._replace(**changes)


def test_the_rank_that_is_behind_is_the_one_that_the_others_wait_for():
    signs = [sign(0), sign(1, point="step.begin", number=1), sign(2)]
    assert [found.rank for found in behind(signs)] == [1]
    assert [found.rank for found in behind([sign(0), sign(1, step=3, number=9)])] == [1]


def test_a_slow_rank_is_told_of_once_and_like_ones_never(capsys):
    watchdog = Watchdog(None, slow_factor=2.0)
    busy = [0.1, 0.35, 0.12, 0.09]
    watchdog.signs.all = lambda: [sign(rank, busy=seconds) for rank, seconds in enumerate(busy)]
    for _ in range(5):
        watchdog._look_for_slow_ranks()
    told = capsys.readouterr().out
    assert told.count("warning: rank 1 (node) is slow: data and forward pass take it 0.35 s a step") == 1
    busy[1] = 0.11
    assert slow(watchdog.signs.all(), 2.0) == []
    for _ in range(200):
        watchdog._look_for_slow_ranks()
    assert capsys.readouterr().out == ""
