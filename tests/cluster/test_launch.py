"""Ranks that Lightning starts, and ranks that torchrun starts: one run folder, one process's numbers."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from dpo_lightning.checkpoints.resume import to_resume
from tests.nursery import nursery
from tests.ranks import TINY, environment, environments, run_ranks

SHORT = [*TINY, "trainer.max_steps=3"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    """Return the folder of a run on one process, eight pairs a step."""
    run = tmp_path_factory.mktemp("one") / "run"
    words = [*SHORT, "data.batch_size=8", f"run_dir={run}"]
    run_ranks([words], cache, world=1)
    return run


def compare(two, one, metrics):
    ours, theirs = metrics(two), metrics(one)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in {"train/loss", "train/grad_norm", "val/loss"} & {*b}:
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-5), key
    assert (two / "adapter" / "adapter_model.safetensors").exists()


def test_two_devices_are_started_by_lightning_under_zero2(one, metrics, tmp_path, cache):
    run = tmp_path / "two"
    words = [*SHORT, "data.batch_size=4", "trainer.devices=2", f"run_dir={run}"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_lightning", *words], capture_output=True, text=True, timeout=480, check=False,
        env=environment(cache),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zero2 (2 devices; ZeRO-2 needs" in " ".join(done.stdout.split())
    compare(run, one, metrics)


def test_two_nodes_of_one_device_equal_one_process(one, metrics, tmp_path, cache):
    run = tmp_path / "nodes"
    words = [*SHORT, "data.batch_size=4", "trainer.devices=1", "trainer.num_nodes=2", f"run_dir={run}"]
    for code, output in nursery().run([words], environments(environment(cache), 2, nodes=2)):
        assert code == 0, output
        assert output.splitlines()[-1] == "[0]", output
    compare(run, one, metrics)


def test_torchruns_ranks_share_a_dated_folder(one, metrics, tmp_path, cache):
    words = [*SHORT, "data.batch_size=4", "trainer.devices=2", "strategy=ddp"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dpo_lightning", *words]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=480, check=False, cwd=tmp_path,
        env=environment(cache) | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    compare(run, one, metrics)


def test_a_signal_to_the_first_rank_stops_both_saves_and_exports(tmp_path, cache):
    run = tmp_path / "run"
    words = [*TINY, "data.batch_size=4", "trainer.devices=2", "trainer.max_epochs=1000", f"run_dir={run}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", *words], env=environment(cache), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and "train/loss" in metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 143, output
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert to_resume("auto", run) is not None


def test_a_port_that_is_taken_is_told_and_no_rank_stays_behind(tmp_path, cache):
    words = [*SHORT, "trainer.devices=2", "strategy=ddp", f"run_dir={tmp_path / 'run'}"]
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(  # waits until all processes that hold its pipes have ended
            [sys.executable, "-m", "dpo_lightning", *words], capture_output=True, text=True, timeout=120, check=False,
            env=environment(cache, MASTER_PORT=port),
        )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == f"error: MASTER_PORT={port} is taken; give a free one, or unset it"
    assert "Traceback" not in done.stderr


def children(process):
    """Yield the command line of each process that one has started."""
    for child in psutil.Process(process).children():
        with suppress(psutil.Error):  # it has ended by now
            yield child.cmdline()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_all_while_the_second_rank_imports_ends_both_with_its_code(number, code, tmp_path, cache):
    words = [*SHORT, "trainer.devices=2", "strategy=ddp", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", *words], env=environment(cache), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("process_1" in " ".join(words) for words in children(process.pid)):
        time.sleep(0.05)
    time.sleep(0.5)  # its imports take seconds
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    early = f"{number.name} while the ranks were starting: rank 1 (pid" in output
    # what is imported may swallow the exception that Ctrl-C raises: then the ranks meet, and stop together
    assert early or (number == signal.SIGINT and "no step was made" in output), output
