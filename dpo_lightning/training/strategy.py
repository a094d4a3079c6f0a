"""How the training is spread over devices: one, DDP, or DeepSpeed's ZeRO."""

from __future__ import annotations

import os
from typing import Any

import torch

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def build_strategy(name: str, pairs: int) -> Any:
    """Return Lightning's strategy of a name: single, ddp, zero1, zero2, zero3 or zero3_offload.

    Args:
        name: of the strategy; see `choose_strategy` for what auto becomes.
        pairs: of a forward pass, which DeepSpeed wants to be told.

    """
    if name == "single":
        return "auto"
    if name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(gradient_as_bucket_view=True)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, and warns
    from dpo_lightning.training.zero import ZeroStrategy

    return ZeroStrategy(STAGES[name], offload=name.endswith("offload"), pairs=pairs)
