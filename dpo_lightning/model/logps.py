"""Batch -> PairLogps, the one way in which policy and reference are scored."""

from __future__ import annotations

from typing import Any

import torch

from dpo_lightning.model import padded, shared_prefix
from dpo_lightning.model.head import install_scoring
from dpo_lightning.types import Batch, PairLogps

LAYOUTS = {"padded": padded.scored_rows, "shared": shared_prefix.scored_rows}


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(base: Any) -> Any:
    """Return what is below a transformers model's head; Llama 4's and Mllama's classes misname it."""
    return base.model if base.base_model is base else base.base_model


def text_of(base: Any) -> Any:
    """Return the part of the trunk that text passes through: all of it, but for what a vision model has beside."""
    decoder = base.get_decoder()
    return trunk_of(base) if decoder is base else decoder


def pair_logps(model: Any, batch: Batch) -> PairLogps:
    """Return the summed log-probabilities of the batch's completions under a causal language model.

    `model` is a transformers model, or a PEFT model around one, whose layout `model.layout` has set; padded
    otherwise. Differentiable; float32 whatever the model's dtype.
    """
    base = base_of(model)
    head = install_scoring(base)
    x_SH, y_S = LAYOUTS[getattr(base, "dpo_layout", "padded")](trunk_of(base), batch)
    tokens_2B = batch.lengths_B3[:, 1:].flatten().to(x_SH.device)
    sums_B2 = torch.segment_reduce(head(x_SH, y_S), "sum", lengths=tokens_2B).view(-1, 2)
    return _pair_logps(sums_B2, batch)


@torch.no_grad()
def plain_logps(model: Any, batch: Batch) -> PairLogps:
    """Compute the same from model(...).logits, sequence by sequence: slow, sure, what `pair_logps` is checked by.

    The model must have its stock attention.
    """
    sums, start = [], 0
    for p, c, r in batch.lengths_B3.tolist():
        prompt = batch.ids_T[start : start + p]
        for first, length in ((start + p, c), (start + p + c, r)):
            ids = torch.cat([prompt, batch.ids_T[first : first + length]])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, p - 1 : -1].float()
            sums.append(logits.log_softmax(1).gather(1, ids[p:, None]).sum())
        start += p + c + r
    return _pair_logps(torch.stack(sums).view(-1, 2), batch)


def _pair_logps(sums_B2: torch.Tensor, batch: Batch) -> PairLogps:
    tokens_B2 = batch.lengths_B3[:, 1:].to(sums_B2)
    return PairLogps(sums_B2[:, 0], sums_B2[:, 1], tokens_B2[:, 0], tokens_B2[:, 1])
