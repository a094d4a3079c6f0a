"""A rank that is killed, hangs or crashes ends the run in bounded time, is named, and leaves no process behind."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dpo_lightning.checkpoints.resume import to_resume
from dpo_lightning.cluster import points, signs, watchdog
from dpo_lightning.cluster.signs import Sign, Signs, Unanswered, behind, slow
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


def run(run_dir: Path, cache: Path, fault: str, *words: str) -> tuple[int, str]:
    """Run two ranks that Lightning starts, with a fault; return code and output."""
    env = environment(cache, DPO_LIGHTNING_FAULT=fault, DPO_LIGHTNING_ALLOW_FAULTS="1")
    command = [sys.executable, "-m", "dpo_lightning", *WORDS, *words, f"run_dir={run_dir}"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, output


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
    code, output = run(run_dir, cache, fault, *words)
    assert code == LOST, output
    assert told in output, output
    assert "goes on from its last checkpoint" in output
    if "hang" in str(words):
        waited = re.search(r"rank 0 has waited (\d+) s after", output)
        assert waited and 10 <= int(waited[1]) < 60, output  # the start does not count
        assert "most recent call first" in output  # the stacks
    assert to_resume("auto", run_dir) is not None
    time.sleep(1)
    assert children_of(str(run_dir)) == []


def run_alone(run_dir: Path, cache: Path, fault: str, *words: str, world: int = 2) -> list[tuple[int, str]]:
    """Run ranks, each started by itself as srun does, with a fault; return exit code and output of each."""
    env = environment(cache, DPO_LIGHTNING_FAULT=fault, DPO_LIGHTNING_ALLOW_FAULTS="1")
    run = [*WORDS, f"trainer.devices={world}", *words, f"run_dir={run_dir}"]
    return nursery().run([run], environments(env, world), timeout=240)


def test_ranks_that_nobody_has_started_for_the_other_end_when_one_hangs(tmp_path, cache):
    words = ["strategy=ddp", "cluster.hang_seconds=10"]
    ended = run_alone(tmp_path / "run", cache, "at=update.begin;do=sleep:999;rank=1;step=3", *words)
    for code, output in ended:
        assert code == LOST or output.splitlines()[-1] == f"[{LOST}]", output  # by the watchdog, or by its error
        assert re.search(r"rank 1 \(.+, pid \d+\), \d+ s after update.begin of step 3, is behind", output), output
        assert "goes on from its last checkpoint" in output
    assert "most recent call first" in ended[1][1]  # the stacks
    assert to_resume("auto", tmp_path / "run") is not None


@pytest.mark.parametrize(
    ("killed", "world", "point", "step", "told"),
    [
        (1, 3, "save.gather", 3, "rank 1 ("),
        (0, 2, "step.begin", 3, "rank 0 cannot be reached any more"),  # the store of the signs goes with it
        (1, 2, "setup", 0, "rank 1 ("),  # before its model is loaded
    ],
)
def test_the_ranks_that_are_left_name_the_one_that_is_killed(tmp_path, cache, killed, world, point, step, told):
    fault = f"at={point};do=SIGKILL;rank={killed};step={step}"
    ended = run_alone(tmp_path / "run", cache, fault, "strategy=zero2", world=world)
    assert ended.pop(killed)[0] == -signal.SIGKILL
    for code, output in ended:
        assert code == LOST or output.splitlines()[-1] == f"[{LOST}]", output  # by the watchdog, or by its error
        assert told in output and "goes on from its last checkpoint" in output
    assert (to_resume("auto", tmp_path / "run") is not None) == (step > 0)


def test_one_rank_that_crashes_ends_the_run_with_its_own_words(tmp_path, cache):
    code, output = run(tmp_path / "run", cache, "at=step.begin;do=raise;rank=1;step=2", "strategy=ddp")
    assert code == LOST, output
    assert "the fault that was asked for at step.begin" in output
    assert re.search(r"rank 1 \((pid \d+\) has ended|.+, pid \d+\), .+ has failed)", output), output


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
    """By more than three times: where tests run beside it on two cores, ten steps' median may double by chance."""
    words = [*looked_at(tmp_path / "run", steps=200), "strategy=ddp", "cluster.slow_factor=3"]
    outputs = run_ranks([words], cache)
    assert "is slow" not in "".join(outputs)


def test_why_the_run_ends_is_what_the_first_rank_to_know_has_told_all(monkeypatch):
    monkeypatch.setattr(signs, "BEAT", 0.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = Signs(store, 0, 2)
    second = Signs(TCPStore("127.0.0.1", store.port, is_master=False), 1, 2)
    for each in (first, second):
        each.tell()
    assert first.verdict() == second.verdict() == ""
    assert second.agree("rank 1 is behind") == "rank 1 is behind"
    assert first.verdict() == second.verdict() == "rank 1 is behind"
    assert first.agree("rank 0 is behind") == "rank 1 is behind"
    assert first.lost(lambda: "rank 1 has ended") == "rank 1 is behind"


def _first_rank(pipe):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(600)


def test_a_first_rank_that_is_stopped_and_answers_nothing_keeps_no_other_from_its_end(monkeypatch):
    monkeypatch.setattr(signs, "ANSWER", timedelta(seconds=1))
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    host = fork.Process(target=_first_rank, args=(there,), daemon=True)
    host.start()
    second = Signs(TCPStore("127.0.0.1", here.recv(), is_master=False), 1, 2)
    second.tell()
    assert second.verdict() == ""
    os.kill(host.pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(Unanswered):
            second.verdict()
        assert second.lost(lambda: "") == "rank 0 cannot be reached any more (no answer in 1 s)"
        assert second.agree("rank 0 is behind") == "rank 0 is behind"
        assert time.monotonic() - began < 30
    finally:
        host.kill()


def test_a_run_that_is_given_up_ends_though_nothing_can_be_told_and_writes_its_checkpoint(tmp_path):
    def write(seconds):
        (tmp_path / "state").write_text("whole")

    if not (child := os.fork()):
        sys.stderr = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - a full disk
        Watchdog(None, 2.0, write)._give_up("rank 1 is behind", 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == LOST
    assert (tmp_path / "state").read_text() == "whole"


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "hangs"])
def test_the_time_that_a_process_was_stopped_for_is_no_hang(goes_on):
    (there, here), (ready, watches) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.close(here)
        watchdog = Watchdog(6, 2.0)
        tell = watchdog.signs.tell
        watchdog.signs.tell = lambda: (tell(), os.write(watches, b"."))[0]  # a beat has been: the watch goes on
        points.at("data.next", 0)
        watchdog._begin()
        os.read(there, 1)  # until the test lets it go on
        os._exit(0)
    os.close(there)
    os.read(ready, 1)
    time.sleep(0.2)
    os.kill(child, signal.SIGSTOP)
    time.sleep(9)
    os.kill(child, signal.SIGCONT)
    time.sleep(1.5)
    if goes_on:
        os.close(here)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if goes_on else LOST)
    if not goes_on:
        os.close(here)


def test_what_comes_before_the_ranks_are_started_is_no_hang(monkeypatch):
    """Such as half an hour of tokenising."""
    launcher = SubprocessLauncher()
    monkeypatch.setattr(points, "_place", points.Place("start", 0, 0, time.monotonic() - 7200))
    watchdog = Watchdog(1800, 2.0)
    watchdog.take_over(cast(Any, SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))))
    launcher._call_children_scripts()
    assert time.monotonic() - points.here().since < 60 and watchdog._limit() == 1800
    watchdog.end()


class SubprocessLauncher(_SubprocessScriptLauncher):
    """Starts nobody."""

    def __init__(self):
        self.procs = []

    def _call_children_scripts(self):
        pass


def test_a_model_may_take_longer_to_load_than_a_step():
    watchdog = Watchdog(10, 2.0)
    points.at("setup", 0)
    assert watchdog._limit() == 1800
    points.at("data.next", 0)
    assert watchdog._limit() == 10
    assert Watchdog(None, 2.0)._limit() == math.inf


def sign(rank: int, **changes) -> Sign:
    return Sign(rank, "node", 100 + rank, 9, "backward.begin", 4, 3, 60.0, 0.1, "data")._replace(**changes)


def test_the_rank_that_is_behind_is_the_one_that_the_others_wait_for():
    told = [sign(0), sign(1, point="step.begin", number=1), sign(2)]
    assert [found.rank for found in behind(told)] == [1]
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
