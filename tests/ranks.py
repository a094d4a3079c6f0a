"""Real ranks for tests: processes that talk over gloo, each of which runs several command lines one after the other."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Return the environment of a rank: one thread, so that bits can be compared, and DeepSpeed's op built once."""
    return {
        **os.environ, "DPO_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip


def start(command: Sequence[str], world: int, env: Mapping[str, str]) -> list[subprocess.Popen[str]]:
    """Start a process for each rank, as a launcher of a node would."""
    shared = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            command, env={**shared, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}, text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finished(processes: Sequence[subprocess.Popen[str]], timeout: float = 280) -> list[tuple[int, str]]:
    """Wait for the ranks; return exit code and output of each. None outlives the wait."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run_ranks(runs: Sequence[Sequence[str]], cache: Path, world: int = 2, **more: str) -> list[list[int]]:
    """Run command lines one after the other, each on all ranks; return each rank's exit codes.

    A process that does not come to its end fails the test with its output.
    """
    done = finished(start([sys.executable, __file__, json.dumps(runs)], world, environment(cache, **more)))
    for code, output in done:
        assert code == 0, output
    return [json.loads(output.splitlines()[-1]) for _, output in done]


def main(runs: list[list[str]]) -> list[int]:
    """Be one rank."""
    from hydra.core.global_hydra import GlobalHydra

    from dpo_lightning.__main__ import main as cli

    codes = []
    for words in runs:
        GlobalHydra.instance().clear()
        sys.argv = ["dpo_lightning", *words]
        try:
            cli()
        except SystemExit as done:
            codes.append(int(done.code or 0))
    return codes


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it
