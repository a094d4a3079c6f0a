"""A SLURM of one node on this machine: munged, slurmctld and slurmd as Debian ships them, in a folder of their own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.ranks import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=debug
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    if absent := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"{', '.join(absent)} are not installed: apt-get install slurmctld slurmd munge slurm-client"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root alone"


class Cluster:
    """The daemons while they run; as a context, it ends them and every job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._running = ExitStack()

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(host=host, folder=self.folder, ports=(free_port(), free_port()))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in MUNGE_FILES}
        try:
            self._start("munged", "--foreground", "--force", "--num-threads=1", *files.values())
            self._wait_for((self.folder / "munge.socket").exists, "munged")
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D")
            self._wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t", check=False), "a node")
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.ask("scancel", "--signal=KILL", "--full", "--me", check=False)
        self.ask("scancel", "--me", check=False)
        self._running.close()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as out:
            process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)
        self._running.callback(process.wait, 20)
        self._running.callback(process.terminate)

    def _wait_for(self, ready, what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"{what} is not there\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def ask(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's commands; return what it prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, *words: str, env: Mapping[str, str], cwd: Path) -> str:
        """Run sbatch; return the job's id."""
        environment = {**env, "SLURM_CONF": self.env["SLURM_CONF"]}
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        line = self.ask("scontrol", "show", "job", "--oneliner", job)
        return {"all": line} | dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Return a job's facts once it is in one of the states."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{facts}\n{self.logs()}"
            time.sleep(0.2)
        return facts

    def wait_for_log(self, text: str, seconds: float = 90) -> None:
        """Wait until slurmctld says so."""
        log = self.folder / "slurmctld.log"
        self._wait_for(lambda: text in log.read_text(errors="replace"), text, seconds)

    def end_in_two_minutes(self, job: str) -> None:
        """Cut a running job's time, which SLURM counts in minutes: two to three of them remain."""
        *_, minutes, _ = self.facts(job)["RunTime"].split(":")
        self.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 3}")

    def wait_for_requeue(self, job: str, *changes: str) -> None:
        """Wait until a job is in the queue again, and let it start soon, instead of in the two minutes SLURM waits.

        Not at once: slurmd takes a start in the second of the last end for that one's, and refuses it.
        """
        facts = self.wait(job, "PENDING", "COMPLETED", "FAILED", "CANCELLED")
        assert facts["JobState"] == "PENDING", facts
        self.ask("scontrol", "update", f"JobId={job}", *changes, "StartTime=now+2")


MUNGE_FILES = ("key-file", "socket", "pid-file", "log-file", "seed-file")
