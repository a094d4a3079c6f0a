"""Ranks forked from a process that has imported all they need: most of a tiny run's time would be its imports.

`python -m tests.nursery` reads requests, a line of JSON each: {"runs": command lines, "environments": one for each
rank, "folder": for their outputs, "timeout": seconds}. It answers each with a line, the ranks' exit codes.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def fork(work: Callable[[], int], environment: Mapping[str, str], output: Path) -> int:
    """Do `work` in a process of its own, whose exit code it returns; return the process' number."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(environment)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may outlive the interpreter and abort it


def reap(processes: Sequence[int], timeout: float) -> list[int]:
    """Wait for processes; kill those that live on, and what they have started; return the exit codes."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(processes) and time.monotonic() < deadline:
        for process in [i for i in processes if i not in codes]:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for process in [i for i in processes if i not in codes]:
        os.killpg(process, signal.SIGKILL)
        codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return [codes[process] for process in processes]


class Nursery:
    """The process that imports once, seen from a test."""

    def __init__(self) -> None:
        # What imports read: a rank's threads; its other variables it is given with its work.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        words = [sys.executable, "-m", "tests.nursery"]
        self._process = subprocess.Popen(
            words, env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self.close)

    def run(
        self, runs: Any, environments: Sequence[Mapping[str, str]], timeout: float | None = None
    ) -> list[tuple[int, str]]:  # fmt: skip
        """Let a rank for each environment do the runs; return exit code and output of each.

        By itself the time is several times what a slow machine takes: it ends what hangs, it does not measure.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            limit = timeout or 280 + 20 * len(runs)
            job = {"runs": runs, "environments": [*environments], "folder": folder, "timeout": limit}
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            codes = json.loads(self._process.stdout.readline())
            return [(code, Path(folder, str(rank)).read_text()) for rank, code in enumerate(codes)]

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@cache
def nursery() -> Nursery:
    """Return the one nursery of a test session, started when it is first needed."""
    return Nursery()


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dpo_lightning.train
    import dpo_lightning.training.zero  # noqa: F401
    from dpo_lightning.model import flops
    from tests.ranks import tell

    flops.PEAK_SECONDS = 0.0  # perf/mfu need not be right
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)

        def work(runs: Any = job["runs"]) -> int:
            return tell(runs)

        ranks = [
            fork(work, environment, Path(job["folder"], str(rank)))
            for rank, environment in enumerate(job["environments"])
        ]
        print(json.dumps(reap(ranks, job["timeout"])), file=answers, flush=True)


if __name__ == "__main__":
    serve()
