"""A real SLURM on this machine: jobs that are stopped or lose a rank are started again and end with the same bits."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.ranks import environment, rows, run_ranks, trace, traced
from tests.slurm.cluster import Cluster, missing

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(900)]

TINY = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true",
    "trainer.max_steps=6", "trainer.accelerator=cpu", "trainer.limit_val_batches=1", "data.max_pairs=70",
    "data.max_length=120", "data.batch_size=4", "checkpoint.every_n_steps=2",
]  # fmt: skip
TWO = [*TINY, "strategy=zero2", "trainer.devices=2"]
STEPS = [*range(1, 7)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def env(cache):
    return {**environment(cache), "PYTHON": sys.executable}


def held(run: Path, *words: str) -> list[str]:
    """Return the words of a traced run that stays at the end of step 3 until `release`."""
    words = (*words, "+callbacks.hold._target_=tests.slurm.hold.Hold", f"+callbacks.hold.file={run}/hold")
    kept = traced(run, *words, "+callbacks.hold.step=3")
    (run / "hold").touch()
    return [*kept, "trusted_targets=[tests.ranks.Trace,tests.slurm.hold.Hold]"]


def wait_until_held(run: Path, ranks: int, log: Path) -> None:
    """Wait until every rank is held, and forget that it was."""
    deadline = time.monotonic() + 120
    while len([*run.glob("held-*")]) < ranks:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job has not begun"
        time.sleep(0.1)
    for file in run.glob("held-*"):
        file.unlink()


def release(run: Path) -> None:
    (run / "hold").unlink()


def assert_same(run: Path, golden: Path) -> None:
    for rank in (0, 1):
        assert [*trace(run, rank)] == STEPS
        assert trace(run, rank) == trace(golden, rank)
    assert rows(run) == rows(golden)
    files = [each / "adapter" / "adapter_model.safetensors" for each in (run, golden)]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert sums[0] == sums[1]


def pid_of_rank(job: str, rank: int) -> int:
    """Return the process of a job's rank, the way a person would find it on the node."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = {*(process / "environ").read_text(errors="replace").split("\0")}
            words = (process / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # gone, or not ours
            continue
        if wanted <= variables and words[1:3] == ["-m", "dpo_lightning"]:
            return int(process.name)
    raise AssertionError(f"no process of job {job} is rank {rank}")


@pytest.fixture(scope="module")
def begun(cluster, env, tmp_path_factory):
    """Begin a job on two ranks; return its id, its run folder and its log. The tests before its own run beside it."""
    folder = tmp_path_factory.mktemp("begun")
    size = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]
    words = held(folder / "run", *TWO, "logger=wandb")
    job = cluster.submit(*size, str(ROOT / "launch/train.sbatch"), *words, env=env, cwd=folder)
    return job, folder / "run", folder / f"slurm-{job}.out"


def test_submit_hands_slurm_the_job_that_the_keys_describe(cluster, begun, env, tmp_path):
    words = [*TINY, "trainer.devices=2", "run_dir='my runs/50%'", "slurm.partition=main", "slurm.cpus_per_task=2"]
    slurm = ["slurm.time=1-02:03:00", "slurm.mem=100M", "slurm.extra=['--begin=now+3600','--nice=7']"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo_lightning", "submit", *words, *slurm], cwd=tmp_path, capture_output=True, text=True,
        env={**env, "SLURM_CONF": cluster.env["SLURM_CONF"], "SBATCH_PARTITION": "other"}, check=False,
    )  # fmt: skip
    run = tmp_path / "my runs" / "50%"
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.split()[1].strip(":")
    assert done.stdout == f"job {job}: {run}\nlog: {run}/slurm-{job}.out\n"
    again = cluster.submit(str(run / "job.sbatch"), env=env, cwd=tmp_path)  # the header alone says the same
    for number in (job, again):
        facts = cluster.facts(number)
        cluster.ask("scancel", number)
        told = {"Partition": "main", "NumNodes": "1-1", "NumCPUs": "4", "NtasksPerN:B:S:C": "2:0:*:*", "CPUs/Task": "2"}
        told |= {"TimeLimit": "1-02:03:00", "MinMemoryNode": "100M", "Nice": "7", "Requeue": "1", "JobState": "PENDING"}
        assert {key: facts[key] for key in told} == told
        assert f" StdOut={str(run).replace('%', '%%')}/slurm-{number}.out " in facts["all"]  # %% is a % to SLURM


def test_an_array_runs_the_trials_of_a_sweep_each_to_its_end(cluster, begun, env, tmp_path):
    program = yaml.safe_load((ROOT / "launch/sweeps/beta_lr.yaml").read_text())["program"]
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    runs = {task: tmp_path / "runs" / f"trial-{task}" for task in (1, 2)}
    words = {1: traced(runs[1], *TINY, "loss.beta=0.05"), 2: held(runs[2], *TINY, "loss.beta=0.5")}
    agent = tmp_path / "wandb"
    agent.write_text("\n".join([
        "#!/usr/bin/env bash", 'echo "$*" >>"agent-$SLURM_ARRAY_TASK_ID"',
        "export WANDB_SWEEP_ID=s1 WANDB_RUN_ID=r$SLURM_ARRAY_TASK_ID", "case $SLURM_ARRAY_TASK_ID in",
        *(f"{task}) bash {program} {' '.join(words[task])} ;;" for task in words), "esac", "true", "",
    ]))  # fmt: skip
    agent.chmod(0o755)
    size = ["--array=1-2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    script = str(tmp_path / "launch" / "sweep.sbatch")
    job = cluster.submit(*size, script, "me/p/s1", env={**env, "WANDB": str(agent)}, cwd=tmp_path)
    log = tmp_path / f"slurm-{job}_2.out"
    wait_until_held(runs[2], 1, log)
    cluster.ask("scancel", "--signal=USR1", f"{job}_2")
    time.sleep(0.5)
    release(runs[2])
    cluster.wait_for_requeue(f"{job}_2")
    for task, restarts in ((1, "0"), (2, "1")):
        facts = cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED")
        text = (tmp_path / f"slurm-{job}_{task}.out").read_text()
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), text
        assert [*trace(runs[task])] == STEPS
        assert (runs[task] / "adapter" / "adapter_model.safetensors").exists()
        assert (tmp_path / f"agent-{task}").read_text() == "agent --count 1 me/p/s1\n", "it has begun one trial"
    betas = [yaml.safe_load((runs[task] / "config.yaml").read_text())["loss"]["beta"] for task in (1, 2)]
    assert betas == [0.05, 0.5]


def test_a_job_that_loses_a_rank_and_runs_out_of_time_ends_with_the_same_bits(cluster, begun, cache, tmp_path):
    job, run, log = begun
    golden = tmp_path / "golden"  # the run that nothing stops, outside of SLURM
    wait_until_held(run, 2, log)
    os.kill(pid_of_rank(job, 1), signal.SIGKILL)
    cluster.wait_for_requeue(job)
    wait_until_held(run, 2, log)
    cluster.end_in_two_minutes(job)  # now SLURM itself sends what the script's header asks for
    run_ranks([traced(golden, *TWO)], cache)
    cluster.wait_for_log("warning signal 10")
    release(run)
    cluster.wait_for_requeue(job, "TimeLimit=30")
    facts = cluster.wait(job, "COMPLETED", "FAILED")
    text = log.read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "2", "0:0"), text
    assert re.findall(r"exit code (\d+): job (\d+) is to be started again", text) == [("137", job), ("138", job)]
    assert text.count("SIGUSR1: stopping at the end of this step") == 2, "both ranks got it"
    assert re.findall(r"resumed from step (\d+)", " ".join(text.split()))[-1] == "4"
    assert_same(run, golden)
    lives = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert lives == {(run / "run_id").read_text()}, "each start goes on in the same run of W&B"
