"""AdamW on the trainable parameters, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

LORA_LR, FULL_LR = 1e-4, 1e-6  # what `auto` becomes


def adamw(
    model: nn.Module, total_steps: int, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float,
    schedule: str, warmup_fraction: float,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:  # fmt: skip
    """Return the optimizer of `model`'s trainable parameters and a schedule that steps with it.

    Vectors (norms, biases) are not decayed. The warm-up is linear over its share of `total_steps`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = map(float, betas)  # a whole 0 is taken for a tensor
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    factor = lr_factor(schedule, round(warmup_fraction * total_steps), total_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def reset_settings(optimizer: Any, schedule: torch.optim.lr_scheduler.LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Give a resumed optimizer the settings of this start, and the learning rate of its schedule at this step.

    Restored were those of the checkpoint; where nothing was changed they are the same to the bit.
    """
    schedule.base_lrs = [group["lr"] for group in settings]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, own, factor in zip(optimizer.param_groups, settings, factors, strict=True):
        group |= {**own, "initial_lr": own["lr"], "lr": own["lr"] * factor}
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def settings_of(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> list[dict[str, Any]]:
    """Return what a new optimizer's groups were given: base learning rate, betas, eps, weight decay."""
    return [
        {"lr": lr, **{key: group[key] for key in ("betas", "eps", "weight_decay")}}
        for group, lr in zip(optimizer.param_groups, schedule.base_lrs, strict=True)
    ]


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a flat rest in the parameter's place


def lr_factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Return step -> factor on the learning rate: up over `warmup` steps, then constant, or down to 0 at `total`.

    >>> [round(lr_factor("linear", 2, 6)(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]

    return factor


def resolve_lr(lr: float | str, full: bool) -> float:
    """Return the number that lr=auto becomes."""
    return (FULL_LR if full else LORA_LR) if lr == "auto" else float(lr)
