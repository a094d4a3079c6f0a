"""One training by TRL, in a process of its own: `python -m benchmarks.trl_arm JSON`; benchmarks/arms.py makes the JSON.

{"model": folder, "rows": jsonl file, "out": file to write, "config": keywords of DPOConfig,
 "lora": keywords of LoraConfig or null, "compact": whether the head scores completion tokens alone}
"""

# TRL is installed for benchmarks alone, and exports lazily, which pyright takes for private.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.pairs import token_digest


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before: loading, logging and all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


def compact_head() -> None:
    """Let the head score completion tokens alone, as TRL does where Triton is.

    TRL asks `_use_triton` twice, by two names: in trainer/utils.py to choose the rows that are scored, in
    kernels/chunked_logprob.py to choose the kernel. Only the first is replaced, so that the torch kernel stays.
    """
    trl.trainer.utils._use_triton = lambda device: True


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train; return each step's figures (see records.Step), and the digest of the tokens trained on."""
    if job["compact"]:
        compact_head()
    clock = Clock()
    trainer = DPOTrainer(
        model=job["model"],
        args=DPOConfig(**job["config"]),
        train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
        callbacks=[clock],
        peft_config=LoraConfig(**job["lora"]) if job["lora"] else None,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    tokens: Any = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return {
        "steps": [
            {
                "seconds": seconds,
                "loss": entry["loss"],
                "grad_norm": entry["grad_norm"],
                "chosen": entry["logps/chosen"],
                "rejected": entry["logps/rejected"],
            }
            for seconds, entry in zip(clock.seconds, logged, strict=True)
        ],
        "peak_device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "digest": token_digest((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in tokens),
    }


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    Path(settings["out"]).write_text(json.dumps(train(settings)))
