"""The adapter, or none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from dpo_lightning.model.logps import text_of, trunk_of
from dpo_lightning.model.lora_linear import LoraLinear
from dpo_lightning.types import UserError

PATTERN = "a text is a regular expression of whole names; [{}] is a list of their ends"


def add_lora(
    model: Any, *, r: int, lora_alpha: int, lora_dropout: float, target_modules: str | Sequence[str]
) -> torch.nn.Module:
    """Return `model` wrapped in a LoRA adapter (https://arxiv.org/abs/2106.09685), its own weights frozen.

    The adapter is float32 and starts as zero change: A random, B zero. Names and defaults are PEFT's.
    Raises UserError where a target is no layer of the model, or none that takes an adapter.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    _check_targets(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        exclude_modules="|".join(_without_adapter(model)) or None,
        task_type=TaskType.CAUSAL_LM,
    )
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    try:
        with torch.device("cpu"):  # the same initial values whatever the device; PEFT moves them to the model's
            return get_peft_model(model, config).train()
    except ValueError as error:
        raise UserError(f"lora.target_modules={target_modules}: {str(error).splitlines()[0]}") from None


def _check_targets(model: torch.nn.Module, targets: str | list[str]) -> None:
    """Raise UserError for a name that matches nothing; PEFT passes over it where another one matches."""
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, list):
        lacking = [end for end in targets if not any(f".{name}".endswith(f".{end}") for name in names)]
    else:
        lacking = [] if _matches(targets, names) else [f"{targets} ({PATTERN.format(targets)})"]
    if lacking:
        linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D))
        ends = sorted({name.rpartition(".")[2] for name in linear})
        told = f"no layer is called {', '.join(lacking)}; there are {', '.join(ends)}"
        raise UserError(f"lora.target_modules={targets}: {told}")


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UserError(f"lora.target_modules={pattern}: no regular expression ({error})") from None


def _without_adapter(model: torch.nn.Module) -> Iterator[str]:
    """Yield patterns of the layers that take no adapter, or would never train one."""
    towers = {id(part) for part in _beside_text(model)}
    for name, part in model.named_modules():
        # The routers of Llama 4 and Phi-MoE are linear layers that return more than their product.
        if isinstance(part, torch.nn.Linear) and "Router" in type(part).__name__:
            yield re.escape(name)
        elif id(part) in towers:
            yield rf"{re.escape(name)}(\..*)?"


def _beside_text(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts of a model's trunk that text does not pass through, such as a vision tower."""
    text = {*text_of(model).modules()}
    return [part for part in trunk_of(model).children() if text.isdisjoint(part.modules())]


def no_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Full fine-tuning: every weight trains that text passes through."""
    model.requires_grad_(True)
    for part in _beside_text(model):
        part.requires_grad_(False)
    return model


@contextmanager
def adapter_off(policy: torch.nn.Module) -> Iterator[None]:
    """Have the policy compute without its adapter for as long as the context lasts.

    PEFT's `disable_adapter` gives the same numbers, but asks after each parameter's state and switches its gradient
    off and on again: on the host as long as the launches of a small model's whole forward pass.
    """
    layers = [part for part in policy.modules() if isinstance(part, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
