"""Before a job trains its ranks find each other and their GPUs, or the host and the remedy are named."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from dpo_lightning.cluster import preflight
from dpo_lightning.cluster.slurm import first_host
from dpo_lightning.types import UserError
from tests.ranks import ROOT, finished, free_port


def ranks(present: int, world: int, *words: str, patience: float = 90) -> list[tuple[int, str]]:
    """Run the preflight of the first `present` of `world` ranks as srun would; return their exit codes and outputs."""
    slurm = {
        "SLURM_NTASKS": str(world),
        "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    program = (
        "import sys; from datetime import timedelta; from dpo_lightning.cluster import preflight; "
        f"preflight.MEET = timedelta(seconds={patience}); sys.exit(preflight.main(*sys.argv[1:]))"
    )
    return finished([
        subprocess.Popen(
            [sys.executable, "-c", program, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        ) for rank in range(present)
    ])  # fmt: skip


def test_ranks_that_find_each_other_say_nothing():
    for code, output in ranks(2, 2, "2", "cpu"):
        assert (code, "error" in output) == (0, False), output


def test_a_rank_that_finds_no_other_ends_with_the_network_to_look_at():
    ((code, output),) = ranks(1, 2, "2", "cpu", patience=3)
    assert code == 2, output
    assert "rank 0 does not reach the 1 others by way of localhost:" in output
    assert "GLOO_SOCKET_IFNAME" in output.splitlines()[-1]


@pytest.mark.parametrize(
    "nodes", ["n1", "n1,n2", "gpu[003-007,12],login1", "gpu[8,9]", "gpu[1-2]-ib", "a-b[07]", "x1,gpu[1-2]", "10.0.0.1"]
)
def test_the_first_host_is_the_one_that_lightning_takes(nodes):
    assert first_host(nodes) == SLURMEnvironment.resolve_root_node_address(nodes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_a_node_without_gpus_ends_the_job_with_the_option_to_give():
    ((code, output),) = ranks(1, 1, "2", "gpu")
    assert code == 2, output
    assert "2 GPUs are needed, 0 are visible; give sbatch --gpus-per-node=2, or trainer.accelerator=cpu" in output


def test_a_gpu_whose_memory_is_another_processs_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda own: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda own: (12e9 if own == 3 else 79e9, 80e9))
    monkeypatch.setattr(preflight, "RELEASE", 0.0)
    assert preflight.claim(8, 2) == torch.device("cuda", 2)
    with pytest.raises(UserError, match="GPU 3 has 12 of 80 GB free: another process holds the rest"):
        preflight.claim(8, 3)


def test_a_job_that_has_just_ended_is_given_time_to_leave_the_gpu(monkeypatch):
    left = iter([12e9, 40e9, 79e9])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda own: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda own: (next(left), 80e9))
    assert preflight.claim(1, 0) == torch.device("cuda", 0)
    assert next(left, None) is None
