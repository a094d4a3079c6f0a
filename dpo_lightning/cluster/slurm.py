"""What a job asks SLURM for: when it ends, and to be started again. Both through SLURM's own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from datetime import datetime

REQUEUE = "DPO_LIGHTNING_REQUEUE"  # outer: the batch script does it, seeing the exit code


def job_id() -> str | None:
    """Return this job's id in the form that scontrol takes, or None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def first_host(nodes: str) -> str:
    """Return the first of the hosts that SLURM_NODELIST names; Lightning can tell, too, and takes seconds to import.

    >>> first_host("gpu[003-007,12],login1"), first_host("a1,a2")
    ('gpu003', 'a1')
    """
    first, _, numbers = nodes.partition("[")
    if "," in first or not numbers:
        return first.split(",")[0]
    number, _, rest = numbers.partition("]")
    return first + re.split("[,-]", number)[0] + rest.split(",")[0]


def end_of_job() -> float | None:
    """Return when SLURM will end this job, in seconds since the epoch; None where it has no end or does not tell."""
    if told := os.environ.get("SLURM_JOB_END_TIME"):
        return float(told)
    job = job_id()
    if job is None or shutil.which("squeue") is None:
        return None
    done = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%e")
    try:
        return datetime.fromisoformat(done.strip()).timestamp()
    except ValueError:  # N/A: no limit
        return None


def requeue() -> None:
    """Have SLURM start this job again, where its batch script does not and SLURM can be asked from here."""
    job = job_id()
    if job is None or os.environ.get(REQUEUE) == "outer":
        return
    if shutil.which("scontrol") is None:
        print(f"scontrol is not to be had here; to go on: scontrol requeue {job}", flush=True)
        return
    print(f"asking SLURM to start job {job} again", flush=True)
    _ask("scontrol", "requeue", job)


def _ask(*command: str) -> str:
    """Return what a command of SLURM prints; a controller that does not answer costs the run no more than 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"warning: {' '.join(command)}: {error}", flush=True)
        return ""
    if done.returncode:
        print(f"warning: {' '.join(command)}: {done.stderr.strip()}", flush=True)
    return done.stdout
