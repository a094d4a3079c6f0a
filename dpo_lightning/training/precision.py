"""What trainer.precision=auto becomes, and what frozen weights are stored in."""

from __future__ import annotations

import torch

from dpo_lightning.model import products


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return Lightning's name of a precision: auto is bf16-mixed where the machine computes in bfloat16."""
    if precision != "auto":
        return precision
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16-mixed" if has_bf16 else "32-true"


def caveat(precision: str, device: str) -> str | None:
    """Return what to know of a precision on a kind of device, where somebody asked for one that it does not have."""
    if device != "cpu" or not precision.startswith("bf16") or not products.EMULATED:
        return None
    return "no AVX512_BF16 here: float32, which trainer.precision=auto takes, is faster, without LoRA by far"


def frozen_dtype(precision: str) -> torch.dtype:
    """Return the dtype of weights that do not train."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def store_linears(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Store a frozen model's linear weights in `dtype`, as autocast would cast them on every call.

    The rest (norms, embeddings and a head tied to them) stays as the trained twin has it, so that both compute
    the same bits.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:
            module.to(dtype)
    return model
