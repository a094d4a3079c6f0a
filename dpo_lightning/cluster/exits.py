"""Exit codes: what a run that has ended tells the script, the scheduler or the person that started it.

docs/cluster.md has the table. launch/train.sbatch has SLURM start a job again by them.
"""

from __future__ import annotations

import signal

from dpo_lightning.types import RunError

DONE, CRASHED, USER_ERROR, WRONG_NUMBERS, RANK_LOST, STORAGE, NO_PROGRESS = range(7)
INTERRUPTED = 128 + signal.SIGINT


class WrongNumbers(RunError):
    """A loss or gradient is not finite, or the first loss is not what it has to be."""

    exit_code = WRONG_NUMBERS


class TooLarge(RunError):
    """A forward or backward pass does not fit into a device's memory."""

    exit_code = USER_ERROR


class RankLost(RunError):
    """A process of the run was killed, hangs, or cannot be reached."""

    exit_code = RANK_LOST


class StorageError(RunError):
    """The disk has refused several checkpoints in a row, or the export."""

    exit_code = STORAGE


class NoProgress(RunError):
    """The run was started again several times and has not come to a new checkpoint."""

    exit_code = NO_PROGRESS
