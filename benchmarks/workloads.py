"""What is measured and what must come out: the workloads, their arms, and the ratios with their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The samples lie beside the checkout; --hh and --sharegpt give other files.
DATA = {"hh": "../shared/data/hh-harmless-1000.jsonl.gz", "sharegpt": "../shared/data/sharegpt-dpo-100.json"}

SHIPPED, TUNED, COMPACT = "trl-shipped", "trl-tuned", "trl-tuned-compact"
LIVE, CACHED, CHECKPOINTED = "ours-live", "ours-cached", "ours-checkpointed"
ARMS = {
    SHIPPED: "TRL's defaults: reference in the run, activations recomputed, float32 weights under bfloat16 autocast",
    TUNED: "TRL, reference computed before, no recomputation, bfloat16 frozen weights, allocator settings",
    COMPACT: "TRL tuned, and its head on completion tokens alone, which it does on GPUs only",
    LIVE: "dpo_lightning, reference in the run",
    CACHED: "dpo_lightning, reference cached",
    CHECKPOINTED: "dpo_lightning, reference in the run, activations recomputed",
}
ARMS_IN_FLOAT32 = {
    **ARMS,
    SHIPPED: "TRL's defaults, bfloat16 off: reference in the run, activations recomputed",
    TUNED: "TRL, reference computed before, no recomputation, allocator settings",
}
# TRL's and ours in turn, so that a slow minute of the machine falls on both.
ALL = (SHIPPED, LIVE, TUNED, CACHED, COMPACT, CHECKPOINTED)


@dataclass(frozen=True)
class Workload:
    """A training that both programs do: `warmup` steps that are dropped, then `steps` that are timed."""

    name: str
    data: str
    lora: bool
    lr: float
    arms: tuple[str, ...] = ALL
    warmup: int = 4
    steps: int = 16
    pairs: int = 8  # a step
    max_length: int = 1024
    device: Literal["cpu", "cuda"] = "cpu"
    model: tuple[str, ...] = ("model=smollm2",)  # what dpo_lightning's command line says of it
    precision: Literal["bf16", "32"] = "bf16"  # of both programs; bf16 is mixed, its frozen weights stored as such

    @property
    def all_steps(self) -> int:
        """Return the steps of a run."""
        return self.warmup + self.steps

    @property
    def dtype(self) -> str:
        """Return what the matrix products are computed in."""
        return "bfloat16" if self.precision == "bf16" else "float32"


@dataclass(frozen=True)
class Target:
    """One line of the table: a measure of `over` divided by that of `under`, and what it has to be.

    seconds: total time of the timed steps. memory: peak resident set above the import baseline; on CUDA the most that
    its tensors took on the device. mfu: the share of
    the machine's peak that `over` reaches, no division.
    """

    label: str
    measure: Literal["seconds", "memory", "mfu"]
    over: str
    under: str | None = None
    must: float | None = None
    aim: float | None = None

    @property
    def more_is_better(self) -> bool:
        """Return whether the target is a floor; for memory it is a ceiling."""
        return self.measure != "memory"


def _memory(tuned: bool) -> tuple[Target, ...]:
    checkpointed = Target(
        "memory with activation checkpointing, of shipped", "memory", CHECKPOINTED, SHIPPED, 0.35, 0.2
    )
    if not tuned:
        return (checkpointed,)
    return (
        Target("memory at full speed, of tuned", "memory", CACHED, TUNED, 0.4, 0.25),
        Target("memory at full speed, of tuned with compact head", "memory", CACHED, COMPACT, 0.4, 0.25),
        checkpointed,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("hh-lora", "hh", lora=True, lr=1e-4),
        # Of 8 such pairs TRL without recomputation would hold some 30 GB, as HH's longest batch, 3/4 of it, takes 24.
        Workload("sharegpt-lora", "sharegpt", lora=True, lr=1e-4, pairs=4),
        Workload("hh-full", "hh", lora=False, lr=1e-6, arms=(SHIPPED, LIVE, CACHED, CHECKPOINTED)),
    )
}
TARGETS = {
    "hh-lora": (
        Target("speed against shipped, both paying for the reference", "seconds", SHIPPED, LIVE, 5, 8),
        Target("speed against shipped, reference cached for us", "seconds", SHIPPED, CACHED, 7, 11),
        Target("speed against tuned, reference cached in both", "seconds", TUNED, CACHED, 4, 7),
        Target("speed against tuned with compact head, reference cached in both", "seconds", COMPACT, CACHED, 2.5, 4),
        *_memory(tuned=True),
        Target("share of the bfloat16 GEMM peak, reference in the run (`perf/mfu`)", "mfu", LIVE, None, 0.5, 0.75),
        Target("share of the bfloat16 GEMM peak, reference cached (`perf/mfu`)", "mfu", CACHED, None, 0.5, 0.75),
    ),
    "sharegpt-lora": (
        Target("speed against shipped, both paying for the reference", "seconds", SHIPPED, LIVE, 3, 5),
        Target("speed against shipped, reference cached for us", "seconds", SHIPPED, CACHED),
        Target("speed against tuned, reference cached in both", "seconds", TUNED, CACHED),
        Target("speed against tuned with compact head, reference cached in both", "seconds", COMPACT, CACHED, 1.5, 2.2),
        *_memory(tuned=True),
        Target("share of the bfloat16 GEMM peak, reference cached (`perf/mfu`)", "mfu", CACHED),
    ),
    "hh-full": (
        Target("speed against shipped, both paying for the reference", "seconds", SHIPPED, LIVE, 3, 5),
        Target("speed against shipped, reference cached for us", "seconds", SHIPPED, CACHED),
        Target("memory at full speed, of shipped", "memory", LIVE, SHIPPED),
        *_memory(tuned=False),
        Target("share of the bfloat16 GEMM peak, reference cached (`perf/mfu`)", "mfu", CACHED),
    ),
}
