"""What becomes of the memory that a training on the CPU frees."""

from __future__ import annotations

import ctypes
import os


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of handing it back: a training touches the same gigabytes every step.

    Without this every large temporary of a CPU run is mapped anew, page fault by page fault (2x on elementwise
    chains of 32 MiB tensors). Not for a training on GPUs: it would hold on to weights that have long moved there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 256 << 20)
