"""How the training is spread over devices: one, DDP, or DeepSpeed's ZeRO."""

from __future__ import annotations

import os
from typing import Any

from dpo_lightning.types import UserError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def build_strategy(name: str, pairs: int, cuda: bool, precision: str) -> Any:
    """Return Lightning's strategy of a name: single, ddp, zero1, zero2, zero3 or zero3_offload.

    Args:
        name: of the strategy; see `choose_strategy` for what auto becomes.
        pairs: of a forward pass, which DeepSpeed wants to be told.
        cuda: whether the ranks are GPUs; DeepSpeed would guess.
        precision: Lightning's name.

    Raises UserError for what ZeRO does not do here.

    """
    if name == "single":
        return "auto"
    if name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(gradient_as_bucket_view=True)
    if precision == "16-mixed":
        raise UserError(f"trainer.precision=16-mixed: not with strategy={name}, whose checkpoints would lose the "
                        "scale of the loss; use bf16-mixed, or strategy=ddp")  # fmt: skip
    if "PL_DEEPSPEED_CONFIG_PATH" in os.environ:
        raise UserError("PL_DEEPSPEED_CONFIG_PATH: would replace the strategy's settings; unset it")
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    from dpo_lightning.training.zero import ZeroStrategy

    return ZeroStrategy(STAGES[name], offload=name.endswith("offload"), pairs=pairs)
