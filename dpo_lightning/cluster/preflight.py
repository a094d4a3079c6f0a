"""What a job tries before it trains, by one process for each rank: python -m dpo_lightning.cluster.preflight 8 gpu.

`srun` starts it as it will start the training, with the GPUs of a node (8) and what the ranks compute on (gpu or cpu).
Each rank looks whether its GPU is there, free and computes; then all of them add up a number. Seconds; no model is
loaded. Ends with 0, or with 2 and a line that names the host.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch

from dpo_lightning.cluster.exits import USER_ERROR
from dpo_lightning.cluster.slurm import first_host
from dpo_lightning.types import UserError

TAKEN = 0.1  # of a GPU's memory, by others; a driver and a desktop take less
RELEASE = 60.0  # seconds that a job which has just ended is given to leave a GPU's memory
MEET = timedelta(minutes=3)  # that ranks are given to find each other, as their imports do not end together


def claim(needed: int, own: int) -> torch.device:
    """Return this rank's GPU. Raises UserError where there are not as many as are needed, or it is another's."""
    seen = torch.cuda.device_count()
    if seen < needed:
        remedy = f"give sbatch --gpus-per-node={needed}, or trainer.accelerator=cpu"
        raise UserError(f"{needed} GPUs are needed, {seen} are visible; {remedy}")
    torch.cuda.set_device(own)
    deadline = time.monotonic() + RELEASE
    while True:
        free, total = torch.cuda.mem_get_info(own)
        if free >= (1 - TAKEN) * total:
            return torch.device("cuda", own)
        if time.monotonic() > deadline:
            raise UserError(
                f"GPU {own} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free: another process holds the rest; "
                "end it (nvidia-smi names it), or give sbatch --exclusive"
            )
        time.sleep(1)


def add_up(device: torch.device, rank: int, world: int, address: str) -> None:
    """Add one for each rank. Raises UserError where the ranks do not find each other, or the sum is wrong."""
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", init_method=f"tcp://{address}", rank=rank,
            world_size=world, timeout=MEET,
        )  # fmt: skip
        counted = 0
        # the training's ranks talk by way of their GPUs and of their hosts
        for place in dict.fromkeys([device, torch.device("cpu")]):
            total = torch.ones(1, device=place)
            torch.distributed.all_reduce(total)
            counted = int(total.item())
            if counted != world:
                break
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} does not reach the {world - 1} others by way of {address}: {str(error).splitlines()[0]}; "
            "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the network, MASTER_PORT another port"
        ) from error
    if counted != world:
        raise UserError(f"rank {rank}: {world} ranks have each added 1, and the sum is {counted}")
    torch.distributed.destroy_process_group()


def main(needed: str, accelerator: str) -> int:
    """Try what the words ask for; return the exit code."""
    rank, own, world = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NTASKS"))
    host = os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_NODELIST"])  # as Lightning finds it
    address = f"{host}:{os.environ['MASTER_PORT']}"
    try:
        device = torch.device("cpu") if accelerator == "cpu" else claim(int(needed), own)
        add_up(device, rank, world, address)
    except (UserError, torch.AcceleratorError) as error:
        print(f"error: {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
