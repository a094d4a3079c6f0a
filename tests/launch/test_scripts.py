"""The scripts of launch/ and the verb submit, with commands of SLURM and W&B that write down what they are given.

No SLURM here: tests/slurm has a real one. What is compared is each word, byte for byte, and each exit code.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hydra import compose, initialize_config_dir

from dpo_lightning.config import CONF, check
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SWEEP = yaml.safe_load((LAUNCH / "sweeps" / "beta_lr.yaml").read_text())
FAKE = r"""#!/usr/bin/env bash
name=${0##*/} n=0
while [[ -e $RECORD/$name-$n ]]; do n=$((n + 1)); done
printf '%s\0' "$@" >"$RECORD/$name-$n"
env -0 >"$RECORD/$name-$n.env"
what=${name^^}_DO codes=${name^^}_CODES
eval "${!what:-}"
read -ra codes <<<"${!codes:-}"
exit "${codes[n]:-0}"
"""
ODD = [
    "model.note='two words'", "model.note=\"it's\"", "model.name=$HOME/`id`;$(id)&", "model.base_model='line\nbreak'",
    "logger.name=a*?[b]", r"data.path=C:\n\\", "logger.tags=[a,'b c']", " data.name=both ends ", "export.hub_id=",
    "logger.entity=é", "~callbacks.progress", "+trainer.max_time='00:01'", "model.note=#no", "--config-dir", "my conf",
]  # fmt: skip
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
ARRAY = {**JOB, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
SIZE = ["trainer.num_nodes=1", "trainer.devices=2"]
CHECK, PREFLIGHT, TRAIN = range(3)  # the steps of a job
AGAIN = {1, 4, 134, 137, 138, 139}
FOR_GOOD = {0, 2, 3, 5, 6, 127, 129, 130, 143}


class Ended(NamedTuple):
    code: int
    output: str
    record: Path

    def calls(self, name: str) -> list[list[str]]:
        """Return the words of each call of a command."""
        files = (self.record / f"{name}-{n}" for n in itertools.count())
        return [split(file) for file in itertools.takewhile(Path.exists, files)]

    def environment(self, name: str, n: int) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in split(self.record / f"{name}-{n}.env"))


def split(file: Path) -> list[str]:
    return file.read_bytes().decode().split("\0")[:-1]


def run(folder: Path, script: Path, *words: str, **env: str) -> Ended:
    """Run a script as sbatch would, in `folder`, with commands that write down what they are given."""
    fakes, record = folder / ".fakes", folder / ".record"
    shutil.rmtree(record, ignore_errors=True)
    record.mkdir(parents=True)
    fakes.mkdir(exist_ok=True)
    for name in ("srun", "sbatch", "scontrol", "scancel", "squeue", "wandb", "python"):
        (fakes / name).write_text(FAKE)
        (fakes / name).chmod(0o755)
    known = {"PATH": f"{fakes}:/usr/bin:/bin", "HOME": str(folder), "RECORD": str(record), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", str(script), *words], cwd=folder, env={**known, **env}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout + done.stderr, record)


def train(folder: Path, *words: str, **env: str) -> Ended:
    return run(folder, LAUNCH / "train.sbatch", *words, **{**JOB, **env})


def words_of(call: list[str]) -> list[str]:
    """Return what the program was given: behind -m dpo_lightning."""
    return call[call.index("dpo_lightning") + 1 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_it(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_all_scripts_are_read():
    assert [script.name for script in SCRIPTS] == ["multinode.sh", "sweep.sbatch", "train.sbatch", "trial.sh"]


def test_a_job_checks_itself_and_trains_with_the_words_it_was_given(tmp_path):
    ended = train(tmp_path, *ODD, SLURM_CPUS_PER_TASK="6")
    assert ended.code == 0, ended.output
    steps = ended.calls("srun")
    expected = ["run_dir='runs/slurm-7'", *SIZE, *ODD]
    assert words_of(steps[CHECK]) == ["check", *expected]
    assert words_of(steps[TRAIN]) == expected
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "python"]
    assert steps[CHECK][:4] == one
    all_ = ["--kill-on-bad-exit=1", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2"]
    assert steps[PREFLIGHT] == ["--time=10", *all_, "python", "-m", "dpo_lightning.cluster.preflight", "2", "gpu"]
    assert steps[TRAIN][:4] == all_
    assert steps[TRAIN][7:12] == ["sh", "runs/slurm-7.0.code", "python", "-m", "dpo_lightning"]
    assert len(steps) == 3
    env = ended.environment("srun", TRAIN)
    assert {name: env[name] for name in ("DPO_LIGHTNING_REQUEUE", "MASTER_PORT", "OMP_NUM_THREADS", "NCCL_DEBUG")} == {
        "DPO_LIGHTNING_REQUEUE": "outer", "MASTER_PORT": "20007", "OMP_NUM_THREADS": "6", "NCCL_DEBUG": "WARN",
    }  # fmt: skip
    assert env["SRUN_CPUS_PER_TASK"] == "6"
    assert env["SLURM_NTASKS_PER_NODE"] == "2"


@pytest.mark.parametrize("code", sorted(AGAIN | FOR_GOOD))
def test_exit_code_decides_whether_the_job_is_started_again(code, tmp_path):
    ended = train(tmp_path, SRUN_CODES=f"0 0 {code}")
    assert ended.code == code
    assert ended.calls("scontrol") == ([["requeue", "7"]] if code in AGAIN else [])
    assert ("to be started again" in ended.output) == (code in AGAIN)


RANKS = """if ((n == 2)); then
    while [[ $1 != sh ]]; do shift; done
    "$@"; "$@"; exit "$?"
fi"""


@pytest.mark.parametrize("codes", ["138 143", "2 143", "3 137", "137 143", "143 138", "0 138"])
def test_the_rank_that_ends_first_decides(codes, tmp_path):
    """SLURM's srun would give the largest: 143, of the rank that SLURM itself has ended."""
    ended = train(tmp_path, *ODD, SRUN_DO=RANKS, PYTHON_CODES=codes)
    code = next(int(word) for word in codes.split() if word != "0")
    assert ended.code == code, ended.output
    assert len(ended.calls("scontrol")) == (code in AGAIN)
    assert [words_of(call)[3:] for call in ended.calls("python")] == [ODD, ODD]
    assert [*(tmp_path / "runs").iterdir()] == []


def test_the_shell_around_a_rank_hands_signals_on_to_it_alone(tmp_path):
    """SLURM signals every process of a step."""
    step = train(tmp_path).calls("srun")[TRAIN]
    program = "import signal, time; signal.signal(10, lambda *_: exit(138)); print('go', flush=True); time.sleep(60)"
    note = str(tmp_path / "first")
    process = subprocess.Popen(
        [*step[4:7], "sh", note, sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    os.killpg(process.pid, 10)
    assert process.wait(20) == 138
    assert Path(note).read_text() == "138\n"
    process.stdout.close()


@pytest.mark.parametrize("code", [1, 2, 137, 138])
@pytest.mark.parametrize("step", [CHECK, PREFLIGHT])
def test_what_fails_before_the_training_ends_the_job(code, step, tmp_path):
    ended = train(tmp_path, SRUN_CODES=" ".join(["0"] * step + [str(code)]))
    assert ended.code == (code if step == CHECK else 2)  # SLURM kills the other ranks: srun's code would be theirs
    assert len(ended.calls("srun")) == step + 1
    assert not ended.calls("scontrol")


def test_a_job_that_was_cancelled_is_not_started_again(tmp_path):
    ended = train(tmp_path, SRUN_CODES="0 0 137", SRUN_DO='if ((n == 2)); then kill -TERM "$PPID"; sleep 0.2; fi')
    assert ended.code == 137
    assert not ended.calls("scontrol")


def test_slurm_that_refuses_is_told_of(tmp_path):
    ended = train(tmp_path, SRUN_CODES="0 0 138", SCONTROL_CODES="1")
    assert ended.code == 138
    assert len(ended.calls("scontrol")) == 1
    assert "do it yourself: scontrol requeue 7" in ended.output


def test_a_task_of_an_array_has_its_own_folder_and_is_requeued_alone(tmp_path):
    ended = train(tmp_path, "seed=1", **ARRAY, SRUN_CODES="0 0 138")
    assert words_of(ended.calls("srun")[TRAIN]) == ["run_dir='runs/slurm-5_3'", *SIZE, "seed=1"]
    assert ended.calls("scontrol") == [["requeue", "5_3"]]


@pytest.mark.parametrize("job", [JOB, ARRAY], ids=["job", "array"])
def test_run_folder_is_the_same_after_a_requeue(job, tmp_path):
    lives = [train(tmp_path, **job, SLURM_RESTART_COUNT=str(n)).calls("srun")[TRAIN] for n in range(3)]
    assert words_of(lives[0]) == words_of(lives[1]) == words_of(lives[2])


def test_run_folder_may_be_given_or_lie_elsewhere(tmp_path):
    given = train(tmp_path, "run_dir=mine").calls("srun")[TRAIN]
    assert words_of(given) == [*SIZE, "run_dir=mine"]
    elsewhere = train(tmp_path, RUNS="/my, 'own' runs").calls("srun")[TRAIN]
    word = words_of(elsewhere)[0]
    assert word == r"run_dir='/my, \'own\' runs/slurm-7'"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", [word]).run_dir == "/my, 'own' runs/slurm-7"


def test_cpu_ranks_need_no_gpu(tmp_path):
    steps = train(tmp_path, "trainer.accelerator=cpu").calls("srun")
    assert steps[PREFLIGHT][-3:] == ["dpo_lightning.cluster.preflight", "2", "cpu"]


def test_nodes_and_tasks_follow_from_the_job(tmp_path):
    job = {"SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": ""}
    steps = train(tmp_path, "seed=1", **job).calls("srun")
    assert words_of(steps[TRAIN]) == ["run_dir='runs/slurm-7'", "trainer.num_nodes=2", "trainer.devices=4", "seed=1"]
    assert steps[PREFLIGHT][2:5] == ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]
    assert steps[TRAIN][1:4] == ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("trainer.devices=8", "give sbatch --ntasks-per-node=8 --gpus-per-node=8"),
        ("++trainer.devices=auto", "trainer.devices=auto: leave it out, it is the job's 2"),
        ("trainer.num_nodes=2", "give sbatch --nodes=2"),
    ],
)
def test_a_job_of_another_size_is_refused(word, remedy, tmp_path):
    ended = train(tmp_path, word)
    assert ended.code == 2
    assert ended.output.startswith("error: ") and remedy in ended.output
    assert not ended.calls("srun")


def test_without_a_job_there_is_nothing_to_do(tmp_path):
    ended = run(tmp_path, LAUNCH / "train.sbatch", "seed=1")
    assert (ended.code, ended.output) == (2, "error: this is no SLURM job: start it as sbatch launch/train.sbatch\n")
    assert train(tmp_path, SLURM_NTASKS="4").code == 2


def test_pyxis_is_given_the_image_in_every_step(tmp_path):
    steps = train(tmp_path, CONTAINER="reg/img:1").calls("srun")
    place = [f"--container-mounts={tmp_path}:{tmp_path}", f"--container-workdir={tmp_path}"]
    for step in steps:
        assert step[:4] == ["--container-image=reg/img:1", *place, "--no-container-mount-home"]
    assert "python" in steps[TRAIN]


def test_apptainer_is_given_the_image_in_every_step(tmp_path):
    env = {"CONTAINER": "/my images/dpo.sif", "CONTAINER_MOUNTS": "/a:/b", "PYTHON": "python3"}
    steps = train(tmp_path, *ODD, **env).calls("srun")
    start = ["apptainer", "exec", "--nv", "--bind", "/a:/b", "--pwd", str(tmp_path), "/my images/dpo.sif", "python3"]
    for step in steps:
        at = step.index("apptainer")
        assert step[at : at + len(start)] == start
        assert not [word for word in step if word.startswith("--container")]
    assert words_of(steps[TRAIN])[3:] == ODD


def test_the_checkouts_own_python_is_taken(tmp_path):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch(0o755)
    assert str(own) in train(tmp_path).calls("srun")[TRAIN]
    assert str(own) not in train(tmp_path, CONTAINER="image").calls("srun")[TRAIN]


# torchrun without a scheduler


def multinode(folder: Path, *words: str, **env: str) -> Ended:
    return run(folder, LAUNCH / "multinode.sh", *words, **env)


def test_machines_meet_by_torchrun(tmp_path):
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=a:29500", "--rdzv-id=dpo_lightning"]
    words = ["trainer.num_nodes=2", "trainer.devices=4", *ODD]
    expected = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", *meet, "-m", "dpo_lightning", *words]
    ended = multinode(tmp_path, "--nnodes", "2", "--endpoint", "a:29500", "trainer.devices=4", *ODD)
    assert ended.calls("python") == [expected], ended.output
    ended = multinode(tmp_path, *words[1:], NNODES="2", ENDPOINT="a:29500")
    assert ended.calls("python") == [expected], ended.output


def test_machines_may_be_given_their_ranks(tmp_path):
    options = ["--nnodes", "2", "--endpoint", "a:29500", "--node-rank", "1", "--"]
    (call,) = multinode(tmp_path, *options, "trainer.devices=4", "trainer.num_nodes=2").calls("python")
    assert call[2:7] == ["--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=a", "--master-port=29500"]
    assert words_of(call) == ["trainer.devices=4", "trainer.num_nodes=2"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --nnodes NUMBER"),
        (["--nnodes"], "--nnodes needs a value"),
        (["--nnodes", "2"], "give --endpoint HOST:PORT"),
        (["--nnodes", "2", "--endpoint", "a"], "give --endpoint HOST:PORT"),
        (["--nnodes", "2", "--endpoint", "a:1", "--node-rank", "2"], "--node-rank 2: the machines are 0 to 1"),
        (["--nnodes", "2", "--endpoint", "a:1", "--node-rank", "one"], "--node-rank one: the machines are 0 to 1"),
        (["--nnodes", "2", "--endpoint", "a:1"], "give trainer.devices=NUMBER"),
        (["--nnodes", "2", "--endpoint", "a:1", "trainer.devices=1", "trainer.num_nodes=3"], "--nnodes is 2"),
    ],
)
def test_machines_without_a_number_or_a_place_are_refused(words, told, tmp_path):
    ended = multinode(tmp_path, *words)
    assert (ended.code, ended.output[:7]) == (2, "error: ")
    assert told in ended.output
    assert not ended.calls("python")


# sweeps

AGENT = r"""
trial=(bash launch/trial.sh model=tiny loss=dpo "model.note='two  words'")
if [[ -n ${STOPPED_EARLY:-} ]]; then
    env WANDB_SWEEP_ID=s1 WANDB_RUN_ID=r1 "${trial[@]}" & sleep 1.5; kill -TERM $!; wait
elif [[ -z ${NO_TRIAL:-} ]]; then
    env WANDB_SWEEP_ID=s1 WANDB_RUN_ID=r1 "${trial[@]}" || true
fi
"""
TRIAL = ["model=tiny", "loss=dpo", "model.note='two  words'"]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


def sweep(folder: Path, **env: str) -> Ended:
    job = {**ARRAY, "WANDB_DO": AGENT, **env}
    return run(folder, LAUNCH / "sweep.sbatch", "me/project/s1", **job)


def test_a_trial_of_a_sweep_is_a_job_step_and_its_exit_code_the_jobs(checkout):
    for code in (0, 3, 143):
        ended = sweep(checkout, SRUN_CODES=f"0 0 {code}")
        assert ended.code == code, ended.output
        assert ended.calls("wandb") == [["agent", "--count", "1", "me/project/s1"]]
        assert words_of(ended.calls("srun")[TRAIN]) == ["run_dir='runs/slurm-5_3'", *SIZE, *TRIAL]
        assert ended.environment("srun", TRAIN)["WANDB_RUN_ID"] == "r1"
        assert not ended.calls("scontrol")
        shutil.rmtree(checkout / "runs")


def test_a_trial_that_is_started_again_goes_on_and_is_no_other(checkout):
    first = sweep(checkout, SRUN_CODES="0 0 138")
    step = first.calls("srun")[TRAIN]
    assert (first.code, first.calls("scontrol")) == (138, [["requeue", "5_3"]]), first.output
    again = sweep(checkout, SLURM_RESTART_COUNT="1")
    assert again.code == 0, again.output
    assert again.calls("wandb") == []
    assert words_of(again.calls("srun")[TRAIN]) == words_of(step)
    env = again.environment("srun", TRAIN)
    assert (env["WANDB_SWEEP_ID"], env["WANDB_RUN_ID"]) == ("s1", "r1")
    assert sweep(checkout, SRUN_CODES="0 0 137", SLURM_RESTART_COUNT="2").calls("scontrol") == [["requeue", "5_3"]]


def stop_a_trial(folder: Path, state: str) -> Ended:
    """Send SIGTERM to a trial while SLURM says that its job is in this state."""
    step = "if ((n == 2)); then sleep 3; fi"
    return sweep(folder, STOPPED_EARLY="1", SRUN_CODES="0 0 143", SRUN_DO=step, SQUEUE_DO=f"echo {state}")


def test_a_trial_that_the_sweep_stops_is_told_through_slurm(checkout):
    ended = stop_a_trial(checkout, "RUNNING")
    assert ended.calls("squeue") == [["--noheader", "--jobs=5_3", "--format=%T"]]
    assert ended.calls("scancel") == [["--signal=TERM", "5_3"]], ended.output
    assert ended.code == 143
    assert not ended.calls("scontrol")


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING"])
def test_a_trial_that_slurm_stops_to_start_it_again_is_not_stopped_after_that(checkout, state):
    ended = stop_a_trial(checkout, state)
    assert len(ended.calls("squeue")) == 1, ended.output
    assert not ended.calls("scancel"), "scancel tries again until the job runs"


def test_a_requeue_that_ends_its_own_command_has_not_failed(tmp_path):
    does = 'kill -TERM "$PPID"; sleep 0.2; kill -TERM $$'
    ended = train(tmp_path, SRUN_CODES="0 0 138", SCONTROL_DO=does)
    assert ended.calls("scontrol") == [["requeue", "7"]]
    assert "do it yourself" not in ended.output
    failed = train(tmp_path, SRUN_CODES="0 0 138", SCONTROL_CODES="1")
    assert "do it yourself: scontrol requeue 7" in failed.output


def test_a_sweep_that_is_over_is_told_of(checkout):
    ended = sweep(checkout, NO_TRIAL="1")
    assert (ended.code, ended.calls("srun")) == (2, [])
    assert "no trial was begun" in ended.output


def test_a_sweep_needs_its_name_and_an_array(checkout):
    for job, words in ((ARRAY, []), (JOB, ["me/project/s1"])):
        ended = run(checkout, LAUNCH / "sweep.sbatch", *words, **job)
        assert (ended.code, ended.output[:7]) == (2, "error: ")
        assert not ended.calls("wandb")


def test_elsewhere_a_trial_is_a_run_on_this_machine(checkout):
    ended = run(checkout, LAUNCH / "trial.sh", *ODD, WANDB_SWEEP_ID="s1", WANDB_RUN_ID="r1")
    assert ended.calls("python") == [["-m", "dpo_lightning", *ODD]]


@pytest.mark.parametrize("end", ["min", "max"])
def test_every_trial_of_the_sweep_can_be_trained(end):
    *start, last = SWEEP["command"]
    assert (start[:3], last) == (["${env}", "bash", "${program}"], "${args_no_hyphens}")
    assert (ROOT / SWEEP["program"]) in SCRIPTS
    assert SWEEP["metric"]["name"] == "val/rewards/accuracies"
    parameters = SWEEP["parameters"]
    trials = [*itertools.product(*(each.get("values") or [each[end]] for each in parameters.values()))]
    assert len(trials) == 2 * 3
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for values in trials:
            words = [f"{key}={value}" for key, value in zip(parameters, values, strict=True)]
            cfg = compose("config", [*start[3:], *words])
            check(cfg)
            assert (cfg.loss.beta, cfg.optim.lr) == (parameters["loss.beta"][end], parameters["optim.lr"][end])


# submit


@pytest.fixture
def submitted(cli, tmp_path, monkeypatch, capsys):
    """Run submit in tmp_path with an sbatch that writes down its words; return code, output and record."""
    fakes, record = tmp_path / "fakes", tmp_path / "record"
    monkeypatch.chdir(tmp_path)
    for folder in (fakes, record):
        folder.mkdir()
    (fakes / "sbatch").write_text(FAKE)
    (fakes / "sbatch").chmod(0o755)
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("SBATCH_DO", "echo '42;cluster'")
    monkeypatch.setenv("PATH", f"{fakes}:/usr/bin:/bin")

    def submit(*words: str) -> Ended:
        code = cli("submit", *words)
        captured = capsys.readouterr()
        return Ended(code, captured.out + captured.err, record)

    return submit


TINY = ["model=tiny", "trainer.accelerator=cpu", "trainer.devices=2"]


def header(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.M)


def test_submit_writes_the_job_and_hands_it_to_sbatch(submitted, tmp_path):
    slurm = ["slurm.partition=gpu", "slurm.account=x", "slurm.time=04:00:00", "slurm.mem=64G", "slurm.cpus_per_task=3"]
    ended = submitted("model=tiny", "trainer.devices=2", "trainer.num_nodes=4", "run_dir=mine", *slurm)
    assert ended.code == 0, ended.output
    file = tmp_path / "mine" / "job.sbatch"
    assert ended.output == f"job 42: {tmp_path}/mine\nlog: {tmp_path}/mine/slurm-42.out\n"
    options = [
        "--job-name=dpo", "--signal=USR1@180", "--requeue", "--open-mode=append", "--nodes=4", "--ntasks-per-node=2",
        "--gpus-per-node=2", "--cpus-per-task=3", "--partition=gpu", "--account=x", "--time=04:00:00", "--mem=64G",
        f"--output={tmp_path}/mine/slurm-%j.out",
    ]  # fmt: skip
    assert ended.calls("sbatch") == [["--parsable", *options, str(file)]]
    assert header(file.read_text()) == options
    body = [line for line in (LAUNCH / "train.sbatch").read_text().splitlines() if not line.startswith("#SBATCH ")]
    assert file.read_text().splitlines()[-len(body) + 1 :] == body[1:], "the job is train.sbatch, and no other script"


def test_the_submitted_job_runs_with_the_words_it_was_given(submitted, tmp_path):
    odd = [
        "model.note='two  words; `id` $(id) $HOME'", "model.base_model='line\nbreak'", "logger.tags=[a,'b c']",
        "logger.name=\"it's\"", "~callbacks.progress",
    ]  # fmt: skip
    ended = submitted(*TINY, *odd, "slurm.dry_run=true", "slurm.partition=gpu", "run_dir='my runs/1'")
    assert ended.code == 0, ended.output
    assert not ended.calls("sbatch")
    file = tmp_path / "my runs" / "1" / "job.sbatch"
    assert f"written, not submitted: sbatch '{file}'" in ended.output
    assert f'--output="{file.parent}/slurm-%j.out"' in header(file.read_text())
    elsewhere = tmp_path / "elsewhere"
    job = run(elsewhere, file, **JOB)
    assert job.code == 0, job.output
    words = sorted(words_of(job.calls("srun")[-1]))
    assert words == sorted(["trainer.num_nodes=1", *TINY, *odd, f"run_dir='{file.parent}'"])
    assert job.calls("srun")[CHECK][3] == sys.executable
    assert job.environment("srun", 0)["PWD"] == str(tmp_path)


def test_the_job_knows_the_accelerator_that_a_yaml_gave(submitted, tmp_path):
    site = tmp_path / "conf" / "experiment" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("# @package _global_\ntrainer: {accelerator: cpu, devices: 2}\n")
    words = ["--config-dir", str(tmp_path / "conf"), "experiment=site", "model=tiny"]
    ended = submitted(*words, "slurm.dry_run=true", "run_dir=mine")
    assert ended.code == 0, ended.output
    job = run(tmp_path / "elsewhere", tmp_path / "mine" / "job.sbatch", **JOB)
    assert job.calls("srun")[PREFLIGHT][-2:] == ["2", "cpu"], job.output


def test_a_container_has_its_own_python(submitted, tmp_path):
    ended = submitted(*TINY, "slurm.dry_run=true", "slurm.container=me/dpo.sif", "run_dir=mine")
    assert ended.code == 0, ended.output
    step = run(tmp_path / "elsewhere", tmp_path / "mine" / "job.sbatch", **JOB).calls("srun")[-1]
    assert step[step.index("me/dpo.sif") + 1] == "python"


def test_submit_names_a_folder_that_two_jobs_do_not_share(submitted, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # of a shell within another job
    assert submitted(*TINY, "slurm.dry_run=true").code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-[0-9a-f]{4}", folder.name)
    monkeypatch.setattr("dpo_lightning.cli.submit.fresh_name", lambda: folder.name)
    ended = submitted(*TINY, "slurm.dry_run=true")
    assert ended.code == 2
    assert "submit once more" in ended.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm.partition='a b'"], "slurm.partition=a b: must be a name"),
        (["slurm.partition='a\n#SBATCH --wrap=id'"], "slurm.partition=a"),
        (["slurm.account='x\n'"], "slurm.account=x"),
        (["slurm.qos='$(id)'"], "slurm.qos=$(id): must be a name"),
        (["slurm.time=14400"], "slurm.time=14400: must be like 04:00:00"),
        (["slurm.time='4 hours'"], "slurm.time=4 hours: must be like 04:00:00"),
        (["slurm.mem=lots"], "slurm.mem=lots: must be like 256G"),
        (["slurm.cpus_per_task=0"], "slurm.cpus_per_task=0: must be a whole number above 0"),
        (["slurm.gpus_per_node=-1"], "slurm.gpus_per_node=-1: must be a number of GPUs"),
        (["slurm.container='a b'"], "slurm.container=a b: must be an image's name"),
        (["slurm.constraint='a;b'"], "slurm.constraint=a;b: must be features"),
        (["slurm.extra=['exclusive']"], "slurm.extra=['exclusive']: must be a list of options"),
        (["slurm.extra=['--comment=a b']"], "must be a list of options"),
        (["slurm.extra=['--array=1-3']"], "--array=1-3 follows from"),
        (["slurm.partitoin=a"], "unknown key slurm.partitoin; did you mean slurm.partition?"),
        (["trainer.devices=auto"], "trainer.devices=auto: a job has to know its size"),
        (["trainer.devices=[0,1]"], "a job has to know its size"),
        (["run_dir='a\"b'"], "do not go into a job"),
        (["run_dir='a\nb'"], "do not go into a job"),
        (["loss.beta=-1"], "loss.beta=-1: must be"),
        (["data=jsonl", "data.path=none.jsonl"], "data.path=none.jsonl: no such file"),
        (["resume=gone"], "resume=gone: no such checkpoint"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_submit_refuses_before_anything_is_written(words, told, submitted, tmp_path):
    ended = submitted(*TINY, *words)
    assert ended.code == 2
    assert ended.output.startswith("error: ") and told in ended.output
    assert not ended.calls("sbatch")
    assert {path.name for path in tmp_path.iterdir()} == {"fakes", "record"}


def test_several_jobs_are_not_submitted_at_once(submitted):
    ended = submitted("--multirun", *TINY, "seed=1,2")
    assert ended.code == 2
    assert "error: --multirun: not with submit" in ended.output
    assert not ended.calls("sbatch")


def test_bad_rows_are_told_at_once(submitted, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"chosen": "a", "rejected": "a"}\n')
    ended = submitted(*TINY, "data=jsonl", f"data.path={rows}")
    assert ended.code == 2
    assert "rows.jsonl" in ended.output
    assert not ended.calls("sbatch")


def test_without_sbatch_submit_writes_a_file_or_nothing(submitted, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = submitted(*TINY)
    assert ended.code == 2
    assert ended.output.count("\n") == 1 and ended.output.startswith("error: sbatch: no such command here")
    assert not (tmp_path / "runs").exists()
    assert submitted(*TINY, "slurm.dry_run=true", "run_dir=mine").code == 0
    assert (tmp_path / "mine" / "job.sbatch").exists()


@pytest.mark.parametrize("place", ["/proc/mine", "mine"])
def test_submit_tells_of_a_folder_that_cannot_be_written(place, submitted, tmp_path):
    (tmp_path / "mine" / "job.sbatch").mkdir(parents=True)  # what the file meets
    ended = submitted(*TINY, "slurm.dry_run=true", f"run_dir={place}")
    assert ended.code == 2
    assert ended.output.startswith(f"error: run_dir={tmp_path / place}: ") and ended.output.count("\n") == 1
    assert "written" in ended.output and "choose another" in ended.output


def test_what_sbatch_refuses_is_told(submitted, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_DO", "echo 'sbatch: error: invalid partition specified: gpu' >&2")
    monkeypatch.setenv("SBATCH_CODES", "1")
    ended = submitted(*TINY, "slurm.partition=gpu", "run_dir=mine")
    assert ended.code == 2
    assert ended.output.splitlines() == [
        "error: sbatch: error: invalid partition specified: gpu",
        f"error: {tmp_path}/mine/job.sbatch is what it refused",
    ]


def test_other_verbs_say_that_they_do_not_read_it(cli, tmp_path, capsys):
    assert cli("check", *TINY, "slurm.time=01:00:00", f"resume={tmp_path}") == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "warning: slurm.time=01:00:00 has no effect: submit alone reads it"
    assert "not a whole checkpoint" in told[1]
