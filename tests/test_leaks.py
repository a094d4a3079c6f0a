"""A long run holds no more memory, files and threads than a short one, and saves no more slowly."""

import os
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest

from tests.ranks import TINY, run_ranks

STEPS = int(os.environ.get("DPO_LIGHTNING_STEPS", "300"))  # `make soak` asks for 2000
EVERY = STEPS // 20


class Held(pl.Callback):
    """Notes what the process holds, twenty times."""

    def __init__(self, file: str):
        self.file = Path(file)

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % EVERY == 0:
            trainer.strategy.checkpoint_io.finish()  # a save under way holds what it writes
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            with self.file.open("a") as stream:
                stream.write(f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6} {files} {threads}\n")


@pytest.mark.timeout(300 + STEPS)
def test_nothing_grows(tmp_path, cache):
    words = [
        *TINY, "data.batch_size=2", "trainer.max_epochs=-1", f"trainer.max_steps={STEPS}",
        f"checkpoint.every_n_steps={EVERY}", "trainer.val_check_interval=1.0", f"run_dir={tmp_path / 'run'}",
        f"+callbacks.held.file={tmp_path / 'held'}", "+callbacks.held._target_=tests.test_leaks.Held",
        "trusted_targets=[tests.test_leaks.Held]",
    ]  # fmt: skip
    run_ranks([words], cache, world=1)
    held = [tuple(map(float, line.split())) for line in (tmp_path / "held").read_text().splitlines()]
    assert len(held) == 20
    megabytes, files, threads = zip(*held[4:], strict=True)  # warm
    assert max(files) == min(files)
    assert max(threads) == min(threads)
    assert megabytes[-1] - megabytes[0] < 20, megabytes
