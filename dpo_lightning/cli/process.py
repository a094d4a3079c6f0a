"""The process that a run lives in: its environment and what it prints."""

from __future__ import annotations

import gc
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOISE = (  # known warnings that do not concern the user, each by its message
    r".*treespec, LeafSpec.*",
    r".*is_gradient_checkpointing. is deprecated.*",
    r"Found .* module.s. in eval mode at the start of training.*",  # the frozen reference
    r".*your dataloader is not resumable.*",  # the data module keeps its position
    r".*does not have many workers.*",  # the table is mapped from the disk: a batch is made in a millisecond
    r"Since DeepSpeed handles gradient clipping internally.*",  # it is told what to clip by
    r".*torch.distributed.(all_gather_into|reduce_scatter)_tensor.* is deprecated.*",  # DeepSpeed calls them
    r"The `srun` command is available on your system.*",  # no job: a login node, or a machine that has SLURM's tools
)
# W&B would send the code, the difference to the last commit and all that is printed; none of it is asked for.
PRIVATE = {"WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true", "WANDB_CONSOLE": "off"}


def prepare(outlives: bool) -> None:
    """Keep other packages' chatter off the screen, and out of W&B what the metrics do not need; ask for huge pages."""
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of Latin-1 has no bullet: that must end no run
            if outlives and stream is getattr(sys, f"__{name}__"):  # the process' own, no notebook's and no test's
                setattr(sys, name, outliving(stream))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch first allocates


class Outliving(io.FileIO):
    """A stream that may come to nothing: what is told then is lost, and nothing else.

    A pipe whose reader has gone, a terminal that was closed, a file on a full disk.
    """

    def write(self, data: Any, /) -> int | None:
        """Write, and be content where that cannot be done; rich would end the process, print would raise."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outliving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a standard stream anew, for a run that outlives it: `| head`, or a `tee` that Ctrl-C ends, too."""
    stream.flush()
    raw = Outliving(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type] - as Python does for -u
        encoding=stream.encoding, errors=stream.errors, newline="\n", line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


@contextmanager
def importing() -> Iterator[None]:
    """Import what takes seconds without Python's search for garbage, which takes up to a fifth of them and finds none.

    What was imported lives as long as the process: no later search looks through it, either.
    """
    if "torch" in sys.modules:  # has been done
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
