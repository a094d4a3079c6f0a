"""What the figures were taken on: processor, memory, versions; nothing that names a host or a path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.arms import cores

PACKAGES = ("torch", "transformers", "peft", "trl", "lightning")
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # without either, products in bfloat16 are emulated
UNCLEAR = re.compile("unknown| with changes")  # of a commit: it does not tell which sources were measured
SOURCES = ("dpo_lightning", "conf", ":(glob)benchmarks/*.py")  # what a result depends on
CPUINFO = Path("/proc/cpuinfo")


def describe(device: str = "cpu", cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Return processor, cores, threads an arm has, and memory; the accelerator where device is cuda."""
    models = _told("model name", cpuinfo)
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        **({"accelerator": accelerator()} if device == "cuda" else {}),
    }


def lacks_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Return whether the processor is known to have no bfloat16 instructions; torch would know, but is too large here.

    "flags" are an x86's: of any other processor nothing is known.
    """
    flags = _told("flags", cpuinfo)
    return bool(flags) and not BFLOAT16 & {*flags[0].split()}


def _told(key: str, cpuinfo: Path) -> list[str]:
    """Return what is told of each core."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def accelerator() -> str:
    """Return name, memory and driver of the first CUDA device, without loading CUDA into this process."""
    try:
        words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of what is compared, dpo_lightning's as its commit."""
    found = {"dpo_lightning": commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def commit() -> str:
    """Return the commit of the checkout, marked where the sources differ from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", *SOURCES)
    return f"{head or 'unknown'}{' with changes' if changed else ''}"


def is_clear(commit: str) -> bool:
    """Return whether a commit, as `versions` tells it, says which sources were measured."""
    return UNCLEAR.search(commit) is None


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
