"""A signal to any rank, at any point, ends all ranks at one step's end, with one checkpoint and the table's code."""

import os
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from dpo_lightning.checkpoints.folder import published, step_number, verify
from dpo_lightning.cluster import slurm
from dpo_lightning.cluster.exits import NO_PROGRESS
from dpo_lightning.cluster.interrupt import Interrupt
from dpo_lightning.training.time_limit import TimeLimit
from tests.ranks import ROOT, TINY, environment, fault, rows, run_ranks, trace, traced

WORDS = [
    *TINY, "trainer.max_epochs=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2", "lora.lora_dropout=0.1",
    "trainer.val_check_interval=4", "checkpoint.every_n_steps=4", "trainer.devices=2", "strategy=zero2",
]  # fmt: skip
STEPS = 10
# signal, ranks, point, step that it comes in, step that the run is saved at
CASES = [
    (signal.SIGUSR1, "0", "step.begin", 2, 3),
    (signal.SIGUSR1, "1", "backward.begin", 2, 3),
    (signal.SIGTERM, "0", "update.begin", 4, 5),
    (signal.SIGTERM, "1", "data.next", 3, 4),
    (signal.SIGUSR1, "both", "loss", 6, 7),
    (signal.SIGTERM, "both", "save.gather", 4, 5),
    (signal.SIGUSR1, "1", "val.mid", 4, 5),
    (signal.SIGUSR1, "0", "update.begin", 9, 10),  # leaves the last validation to the next start, too
    (signal.SIGHUP, "both", "backward.end", 5, 6),
    (signal.SIGINT, "1", "log", 2, 2),  # before the ranks agree upon what step 2 brought
]


def name(case: tuple) -> str:
    return f"{case[0].name}-{case[1]}-{case[2]}-{case[3]}"


def fault_of(case: tuple) -> list[str]:
    number, ranks, point, step, _ = case
    only = "" if ranks == "both" else f";rank={ranks}"
    # the loss is a point of tensors: the forward pass is told by its begin
    point = "step.begin" if point == "loss" else point
    nth = ";nth=2" if case[2] == "loss" else ""
    return fault(f"at={point};do={number.name};step={step}{only}{nth}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """Run once without a signal; with each, and then on to the end."""
    folder = tmp_path_factory.mktemp("signals")
    golden = traced(folder / "golden", *WORDS)
    signalled = [[*traced(folder / name(case), *WORDS), *fault_of(case)] for case in CASES]
    first = run_ranks([golden, *signalled], cache, code=[0, *(128 + case[0] for case in CASES)])
    left = {name(case): published(folder / name(case) / "checkpoints") for case in CASES}
    exported = {name(case): (folder / name(case) / "adapter").exists() for case in CASES}
    run_ranks([traced(folder / name(case), *WORDS) for case in CASES], cache)
    return folder, left, exported, first


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_all_ranks_stop_at_one_step_and_the_run_goes_on_to_the_same_bits(runs, case):
    folder, left, exported, outputs = runs
    number, *_, saved = case
    newest = left[name(case)][0]
    assert step_number(newest) == saved, outputs
    # a run that will be started again exports nothing; one that was ended by a person or the system does
    assert exported[name(case)] == (number != signal.SIGUSR1)
    for rank in (0, 1):
        expected = trace(folder / "golden", rank)
        assert [*expected] == [*range(1, STEPS + 1)]
        assert trace(folder / name(case), rank) == expected
    assert rows(folder / name(case)) == rows(folder / "golden")
    file = "adapter/adapter_model.safetensors"
    assert (folder / name(case) / file).read_bytes() == (folder / "golden" / file).read_bytes()
    assert all(verify(place) is None for place in published(folder / name(case) / "checkpoints"))


class HalfStep(torch.optim.AdamW):
    """Signals its own process between two parameters, as a signal that comes at any instant would."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                p.data.add_(1)
        return loss


class Two(pl.LightningModule):
    """Two parameters, each step adds one to both."""

    def __init__(self, optimizer: Any = torch.optim.SGD):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return (self.a + self.b).sum()

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def fit(module: Two, interrupt: Interrupt, folder: Path, **limits: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[interrupt], logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, **limits,
    )  # fmt: skip
    with interrupt.installed():
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8))))
    return trainer


def test_a_signal_in_the_middle_of_an_update_saves_whole_steps(tmp_path):
    """Lightning's own handler would save from within the signal, half of the parameters updated."""
    module, interrupt = Two(HalfStep), Interrupt()
    assert fit(module, interrupt, tmp_path, max_steps=5).global_step == 1
    assert module.a.item() == module.b.item() == 1
    assert interrupt.exit_code == 128 + signal.SIGUSR1


def test_a_run_stops_by_itself_while_there_is_time_for_a_save(tmp_path):
    ends = []
    end_of_job = lambda: ends.append(time.time() + 9) or ends[0]  # noqa: E731 - asked when the training begins
    interrupt = Interrupt(end_of_job, lambda: 0.5)  # 5 s and two of the longest steps are kept besides
    assert fit(Two(), interrupt, tmp_path, max_epochs=-1).global_step > 1
    assert interrupt.exit_code == 128 + signal.SIGUSR1
    assert 4 < ends[0] - time.time() < 8


class SlowValidation(Two):
    """Validates for a second after each step."""

    def validation_step(self, batch, batch_idx):
        time.sleep(1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1)))


def test_a_run_stops_while_there_is_time_for_a_save_and_not_for_the_validation_before_it(tmp_path):
    ends = []
    end_of_job = lambda: ends.append(time.time() + 11) or ends[0]  # noqa: E731
    interrupt = Interrupt(end_of_job, lambda: 0.5)
    trainer = fit(SlowValidation(), interrupt, tmp_path, max_epochs=-1, val_check_interval=1)
    assert trainer.global_step > 1
    assert interrupt.state_dict() == {"validation_left_out": True}
    assert 5 < ends[0] - time.time() < 9


def test_only_the_first_signal_stops_what_can_be_left_out():
    interrupt = Interrupt()
    with interrupt.installed():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with pytest.raises(KeyboardInterrupt), interrupt.stoppable():
                try:
                    os.kill(os.getpid(), number)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)


ENDING = """
import os, sys
from peft import PeftModel
from dpo_lightning.__main__ import main
from dpo_lightning import train
from dpo_lightning.outputs import samples
from dpo_lightning.training.loggers import JsonlLogger

def signalled(work):
    def with_signals(*args, **kwargs):
        for number in map(int, sys.stdin.readline().split()):
            os.kill(os.getpid(), number)
        return work(*args, **kwargs)
    return with_signals

PeftModel.save_pretrained = signalled(PeftModel.save_pretrained)
samples.generate = signalled(samples.generate)
JsonlLogger.close = signalled(JsonlLogger.close)
train.close = signalled(train.close)
main()
"""


@pytest.mark.parametrize("at", ["export", "answers"])
def test_signals_from_the_export_to_the_end_of_the_loggers_do_not_keep_a_run_from_its_end(at, tmp_path, cache):
    run = tmp_path / "run"
    (run / ".adapter-1").mkdir(parents=True)  # a process was killed there
    words = [*TINY[:3], *TINY[4:], "samples.count=1", "trainer.max_steps=1", f"run_dir={run}"]
    both = f"{signal.SIGTERM:d} {signal.SIGUSR1:d}\n"
    signals = "\n" * (at == "answers") + f"{signal.SIGTERM:d} {signal.SIGTERM:d}\n" + 2 * both
    done = subprocess.run(
        [sys.executable, "-c", ENDING, *words], input=signals, env=environment(cache), capture_output=True, text=True,
        cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the answers are skipped" in done.stdout
    assert "the last step has been made" in done.stderr
    assert not (run / "samples.json").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert not list(run.glob(".adapter-*"))
    assert '"end": 0' in (run / "starts.jsonl").read_text()


def test_a_terminal_that_is_closed_does_nothing_under_nohup():
    interrupt = Interrupt()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.installed(), interrupt.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert interrupt.signal is None


def test_what_comes_after_the_first_signal_changes_nothing():
    interrupt = Interrupt()
    with interrupt.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C; a second would kill
        interrupt.stopping = True  # from here on that does not kill either
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.signal == signal.SIGUSR1


def test_a_job_at_its_end_begins_nothing_and_is_requeued_once(tmp_path, cache):
    """SLURM tells the end; nobody sends a signal. The batch script that would requeue is not there."""
    calls, commands = tmp_path / "calls", tmp_path / "bin"
    commands.mkdir()
    write_command(commands / "scontrol", f'echo "$@" >> {calls}')
    inside = [
        *traced(tmp_path / "run", *WORDS[:-2], "reference=adapter_off"),
        f"env:PATH={commands}:{os.environ['PATH']}", "env:SLURM_JOB_ID=77",
        f"env:SLURM_JOB_END_TIME={time.time() + 30}",
    ]  # fmt: skip
    outer = [*inside, "env:DPO_LIGHTNING_REQUEUE=outer", "cluster.max_restarts=1"]
    (output,) = run_ranks([inside, outer, outer], cache, world=1, code=[138, 138, NO_PROGRESS])
    assert output.count("the job's time is nearly over") == 2
    assert calls.read_text() == "requeue 77\n"
    assert "started 2 times from step 0 and never came to a new checkpoint; the job's time was over" in output


def write_command(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("told", "seconds"), [("2030-01-02T03:04:05", True), ("N/A", False), ("", False)], ids=["a time", "none", "nothing"]
)
def test_the_end_of_a_job_is_asked_of_squeue(tmp_path, monkeypatch, told, seconds):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")  # as some sites leave it; empty is unset
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_command(tmp_path / "squeue", f"echo {told}")
    end = slurm.end_of_job()
    assert (end is not None and time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end)) == told) == seconds


def test_an_array_task_is_requeued_by_its_own_id(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.job_id() == "10_2"


def test_a_scontrol_that_fails_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_command(tmp_path / "scontrol", "echo no controller >&2; exit 1")
    slurm.requeue()
    assert "warning: scontrol requeue 7: no controller" in capsys.readouterr().out


def test_steps_that_the_run_is_to_make_at_least_do_not_keep_it_from_stopping(tmp_path):
    interrupt = Interrupt()
    assert fit(Two(HalfStep), interrupt, tmp_path, max_epochs=-1, min_steps=1000, min_epochs=9).global_step == 1


class Handlers(Two):
    """Looks who has the signals when a validation begins."""

    def on_validation_start(self):
        self.seen = signal.getsignal(signal.SIGTERM)


def test_lightning_takes_no_signal(tmp_path):
    module, interrupt = Handlers(), Interrupt()
    module.val_dataloader = lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1)))
    module.validation_step = lambda batch, batch_idx: None
    fit(module, interrupt, tmp_path, max_steps=1)
    assert module.seen == interrupt._request


def test_a_time_limit_ends_at_a_whole_step(tmp_path):
    module, limit = Two(), TimeLimit(timedelta(seconds=0.3))
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (time.sleep(0.05), step(batch, batch_idx))[1]
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[limit], logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_epochs=-1, accumulate_grad_batches=4,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(800))))
    made = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    assert made == 4 * trainer.global_step > 4
