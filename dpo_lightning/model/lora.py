"""The adapter, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_lightning.model.lora_linear import LoraLinear
from dpo_lightning.types import UserError


def add_lora(
    model: Any, *, r: int, lora_alpha: int, lora_dropout: float, target_modules: str | Sequence[str]
) -> torch.nn.Module:
    """Return `model` wrapped in a LoRA adapter (https://arxiv.org/abs/2106.09685), its own weights frozen.

    The adapter is float32 and starts as zero change: A random, B zero. Names and defaults are PEFT's.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
    )
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    try:
        with torch.device("cpu"):  # the same initial values whatever the device; PEFT moves them to the model's
            return get_peft_model(model, config).train()
    except ValueError as error:
        raise UserError(f"lora.target_modules={target_modules}: {str(error).splitlines()[0]}") from None


def no_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Full fine-tuning: every weight trains."""
    return model.requires_grad_(True)
