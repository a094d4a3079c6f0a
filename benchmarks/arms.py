"""How each arm is run: its command line, its environment, and where the times of its steps are read."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import Step
from benchmarks.workloads import CACHED, CHECKPOINTED, COMPACT, SHIPPED, TUNED, Workload

# glibc hands every large temporary back and maps it anew; these keep it. dpo_lightning's entry point sets the like
# for itself, TRL's users can set them in the shell: so only the tuned arms have them.
ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# What the shell may have set that would give an arm more than its own settings.
FOREIGN = ("MALLOC_", "THP_", "OMP_", "MKL_", "KMP_", "ACCELERATE_", "DPO_LIGHTNING_", "LD_PRELOAD", "HF_DATASETS_")
IMPORTS = {  # of a process that has loaded a program and done nothing: the baseline of its memory
    "trl": "import datasets, peft; from trl import DPOConfig, DPOTrainer",
    "ours": "import dpo_lightning.train",
}


def program_of(arm: str) -> str:
    """Return which of the two programs an arm runs: trl or ours."""
    return arm.partition("-")[0]


def cores() -> int:
    """Return the cores that this process may use; each arm has a thread on each."""
    return len(os.sched_getaffinity(0))


def environment(arm: str, scratch: Path, inherited: Mapping[str, str], device: str = "cpu") -> dict[str, str]:
    """Return the environment of an arm: offline, caches of its own, nobody else's tuning; one GPU, or none."""
    kept = {key: value for key, value in inherited.items() if not key.startswith(FOREIGN)}
    return {
        **kept,
        "OMP_NUM_THREADS": str(cores()),
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str((scratch / "cache" / "datasets").absolute()),
        "DPO_LIGHTNING_CACHE": str((scratch / "cache").absolute()),
        **(ALLOCATOR if arm in (TUNED, COMPACT) else {}),
    }


def our_words(workload: Workload, arm: str, rows: Path, run_dir: Path) -> list[str]:
    """Return the words behind `python -m dpo_lightning` for one of our arms."""
    live = "adapter_off" if workload.lora else "frozen_copy"
    precision = "bf16-mixed" if workload.precision == "bf16" else "32-true"
    words = [
        *workload.model, f"trainer.accelerator={'cpu' if workload.device == 'cpu' else 'gpu'}",
        "trainer.devices=1", f"lora={'r16' if workload.lora else 'none'}", f"optim.lr={workload.lr}",
        f"reference={'cached' if arm == CACHED else live}", "data=jsonl", f"data.path={rows}", f"data.val_path={rows}",
        f"data.batch_size={workload.pairs}", "data.shuffle=false", f"data.max_length={workload.max_length}",
        f"trainer.max_steps={workload.all_steps}", f"trainer.precision={precision}",
        "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0", "optim.schedule=constant",
        "optim.warmup_fraction=0", "callbacks=none", "logger=none", "samples.count=0", "seed=0", "resume=never",
        f"run_dir={run_dir}",
    ]  # fmt: skip
    return [*words, "model.gradient_checkpointing=true"] if arm == CHECKPOINTED else words


def trl_config(workload: Workload, arm: str, run_dir: Path) -> dict[str, Any]:
    """Return DPOConfig's keywords for one of TRL's arms; what is not here is as TRL ships it."""
    config: dict[str, Any] = {
        "output_dir": str(run_dir),
        "use_cpu": workload.device == "cpu",  # else it refuses its own default, bfloat16, where no GPU is
        "per_device_train_batch_size": workload.pairs,
        "max_steps": workload.all_steps,
        "max_length": workload.max_length,
        "learning_rate": workload.lr,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
    }
    if arm != SHIPPED:
        config |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "bf16": True}
        # Weights that train stay in float32, or the updates would be rounded away.
        if workload.lora and workload.precision == "bf16":
            config["model_init_kwargs"] = {"dtype": "bfloat16"}
    return config if workload.precision == "bf16" else {**config, "bf16": False}


def command(workload: Workload, arm: str, rows: Path, run_dir: Path, model: str) -> list[str]:
    """Return the command line of an arm that trains `rows` and leaves its traces in `run_dir`."""
    if program_of(arm) == "ours":
        return [sys.executable, "-m", "dpo_lightning", *our_words(workload, arm, rows, run_dir)]
    job = {
        "model": model, "rows": str(rows), "out": str(run_dir / "trl.json"), "compact": arm == COMPACT,
        "config": trl_config(workload, arm, run_dir), "lora": LORA if workload.lora else None,
    }  # fmt: skip
    return [sys.executable, "-m", "benchmarks.trl_arm", json.dumps(job)]


def read_steps(arm: str, run_dir: Path, pairs: int) -> list[Step]:
    """Return the steps of a finished run, whose steps had `pairs` pairs each."""
    if program_of(arm) == "trl":
        return [Step(**step) for step in json.loads((run_dir / "trl.json").read_text())["steps"]]
    return [
        Step(
            pairs / row["perf/pairs_per_second"],
            row["train/loss"],
            row["train/grad_norm"],
            row["train/logps/chosen"],
            row["train/logps/rejected"],
            row.get("perf/mfu"),
        )
        for row in _logged(run_dir)
    ]


def read_memory(arm: str, run_dir: Path) -> int | None:
    """Return the most bytes that a finished run's tensors took on its CUDA device; None if it had none."""
    if program_of(arm) == "trl":
        return json.loads((run_dir / "trl.json").read_text()).get("peak_device")
    peak = _logged(run_dir)[-1].get("perf/device_memory_gb")
    return None if peak is None else round(peak * 1e9)


def _logged(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in lines]
    return [row for row in rows if "train/loss" in row]  # where null stands for what was not finite
