"""Kills a run on two ranks again and again, and lets it go on each time: python -m tests.kill_loop FOLDER KILLS SEED.

Half of the kills are of both ranks at a random instant, as a launcher's when a node goes; half are of the first rank
at a named point inside a save or a deletion, after which the other one is killed, too. The ranks are forked from this
process, which has imported all they need and nothing that has started a thread.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.nursery import fork
from tests.ranks import TINY, environments, main, traced

WORDS = [
    *TINY, "trainer.devices=2", "strategy=zero2", "data.batch_size=2", "trainer.accumulate_grad_batches=2",
    "lora.lora_dropout=0.1", "optim.lr=1e-4", "checkpoint.every_n_steps=2", "trainer.val_check_interval=4",
    "cluster.max_restarts=null",
]  # fmt: skip
POINTS = (
    "save.begin", "save.after_file", "save.before_manifest", "save.before_rename", "save.after_rename",
    "retain.before_delete",
)  # fmt: skip


class Life:
    """Two ranks, forked; `codes` of those that have ended."""

    def __init__(self, words: list[str], log: Path, fault: str | None = None):
        self.codes: dict[int, int] = {}
        env = dict(os.environ)
        if fault:
            env |= {"DPO_LIGHTNING_FAULT": fault, "DPO_LIGHTNING_ALLOW_FAULTS": "1"}
        self.ids = [fork(lambda: main([words])[0], own, log) for own in environments(env, 2)]

    def poll(self) -> bool:
        """Return whether one has ended."""
        for process in [i for i in self.ids if i not in self.codes]:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self.codes[process] = os.waitstatus_to_exitcode(status)
        return bool(self.codes)

    def kill(self) -> None:
        """Kill those that live."""
        self.poll()
        for process in [i for i in self.ids if i not in self.codes]:
            os.kill(process, signal.SIGKILL)
            self.codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def end(self, timeout: float) -> set[int]:
        """Wait until all have ended, or one has died, or the time is over; kill the others; return the exit codes."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and len(self.codes) < 2 and not any(self.codes.values()):
            self.poll()
            time.sleep(0.01)
        self.kill()
        return {*self.codes.values()}


def done_steps(run: Path) -> int:
    file = run / "trace-0.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def loop(folder: Path, kills: int, seed: int, steps: int) -> list[str]:
    """Run once without a kill and once with `kills` of them; return what each life ended with."""
    dice, told = random.Random(seed), []
    golden, run, log = folder / "golden", folder / "run", folder / "run.log"
    words = [*WORDS, "trainer.max_epochs=-1", f"trainer.max_steps={steps}"]
    assert Life(traced(golden, *words), folder / "golden.log").end(900) == {0}, (folder / "golden.log").read_text()
    mine = traced(run, *words)
    for number in range(kills):
        before = done_steps(run)
        if number % 2:
            point, step = dice.choice(POINTS), (before // 2 + dice.randint(1, 2)) * 2
            # at which step one is deleted depends on which is the best
            when = "" if point == "retain.before_delete" else f";step={step}"
            fault = f"at={point};do=SIGKILL;rank=0{when}"
            codes = Life(mine, log, fault).end(120)
        else:
            fault, until, life = "any instant", before + dice.randint(0, 4), Life(mine, log)
            deadline = time.monotonic() + 120
            while done_steps(run) < until and time.monotonic() < deadline and not life.poll():
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
            codes = life.end(0)
        told.append(f"step {done_steps(run)}, {fault}: {sorted(codes)}")
        # the rank that was not killed may see the other go, and end by itself
        assert {-signal.SIGKILL} <= codes <= {-signal.SIGKILL, 1, 4}, (told[-1], log.read_text()[-3000:])
    assert Life(mine, log).end(900) == {0}, log.read_text()[-5000:]
    return told


if __name__ == "__main__":
    import torch

    import dpo_lightning.train
    import dpo_lightning.training.zero  # noqa: F401

    torch.set_num_threads(1)
    for line in loop(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])):
        print(line)
