"""Which layout a model is scored in: shared where it agrees with padded, found out on a probe before training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpo_lightning.model import attention
from dpo_lightning.model.logps import base_of, pair_logps, plain_logps, trunk_of
from dpo_lightning.types import Batch, UserError

EXACT, ROUNDED = 1e-3, 0.1  # nats a token that two ways may differ by: float32, and 16-bit arithmetic
LEAK = 1e-4  # nats; not 0, as experts regroup their tokens
LENGTHS = [[11, 5, 9], [6, 12, 3]]
OPENING = 4


def choose_layout(model: Any, layout: str) -> str:
    """Set the layout `model` is scored in from now on; return its name and, where auto fell back, the reason.

    Raises UserError if the model's head does something unknown, or if layout=shared does not agree with padded.
    """
    with torch.device("cpu"):  # Lightning builds models with their device as the default; lengths lie on the host
        return _chosen(model, layout)


def _chosen(model: Any, layout: str) -> str:
    batch = probe(base_of(model).config.get_text_config().vocab_size, model.device)
    rounded = model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(model.device.type)
    tolerance = ROUNDED if rounded else EXACT
    set_layout(model, "padded")
    with torch.no_grad():
        own = plain_logps(model, batch)
        if not torch.cat([own.chosen, own.rejected]).isfinite().all():
            raise UserError(
                "this model's log-probabilities are not finite: its weights are damaged, or too large for "
                "trainer.precision"
            )
        if not (gap := _gap(pair_logps(model, batch), own)) <= tolerance:
            raise UserError(
                f"this model's own logits give other log-probabilities (by {gap:.2g} a token): its head does "
                "something that is not supported; please report the model's name"
            )
    if layout == "padded":
        return "padded"
    if layout == "auto" and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "padded (dropout is on: chosen and rejected would share its mask over the prompt)"
    if (problem := _shared_problem(model, batch, tolerance)) is None:
        return "shared"
    set_layout(model, "padded")
    if layout == "shared":
        raise UserError(f"data.layout=shared: {problem}; use data.layout=auto or padded")
    return f"padded ({problem})"


@torch.no_grad()
def _shared_problem(model: Any, batch: Batch, tolerance: float) -> str | None:
    """Leave the model in the shared layout; return why it must not stay there, or None."""
    padded = pair_logps(model, batch)
    try:
        set_layout(model, "shared")
        attention.WINDOWS.clear()
        shared = pair_logps(model, batch)
        calls = attention.WINDOWS.total()
        # With other chosen tokens the rejected must come out the same: nothing leaks between them.
        p, c, _ = LENGTHS[0]
        other = batch.ids_T.clone()
        other[p : p + c] = other[p : p + c].flip(0)
        leak = (pair_logps(model, replace(batch, ids_T=other)).rejected - shared.rejected).abs().max().item()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return f"the shared prefix cannot run on this model: {str(error).splitlines()[0][:100]}"
    if hidden := _other_mixing(base_of(model), calls) or _hidden_window(base_of(model).config.get_text_config()):
        return hidden
    if leak > LEAK:
        return f"in the shared prefix chosen tokens reach the rejected ones (by {leak:.2g})"
    gap = _gap(padded, shared)
    return None if gap <= tolerance else f"the shared prefix gives other log-probabilities, by {gap:.2g} a token"


def _other_mixing(base: Any, calls: int) -> str | None:
    """Return what carries tokens to others beside `calls` of our attention; in a probe it may hardly show."""
    layers = getattr(base.config.get_text_config(), "num_hidden_layers", 1)
    if calls < layers:
        return f"{layers - calls} of {layers} layers do not attend by transformers' interface"
    if any(isinstance(part, nn.Conv1d) for part in trunk_of(base).modules()):
        return "it convolves the row"
    return None


def _hidden_window(config: Any) -> str | None:
    """Return why a window that no layer has asked for cannot be kept: the probe is too short to miss it."""
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked by a mask"
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = "sliding_attention" in kinds and getattr(config, "sliding_window", None)
    if slides and not {*attention.WINDOWS} - {None}:
        return "its sliding window is in a mask alone"
    return None


def _gap(one: Any, other: Any) -> float:
    """Return the largest difference a token; NaN if there is one."""
    chosen = abs(one.chosen - other.chosen) / one.chosen_tokens
    rejected = abs(one.rejected - other.rejected) / one.rejected_tokens
    return torch.cat([chosen, rejected]).max().item()


def probe(vocabulary: int, device: torch.device) -> Batch:
    """Return two pairs of random tokens of uneven lengths, whose prompts open alike."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    ids = torch.randint(vocabulary, (int(lengths.sum()),), generator=generator)
    second = int(lengths[0].sum())
    ids[second : second + OPENING] = ids[:OPENING]
    return Batch(ids.to(device), lengths, torch.arange(len(lengths)), len(lengths), opening=OPENING)


def set_layout(model: Any, layout: str) -> None:
    """Score `model` in this layout from now on; padded is with its own attention, which generation needs too."""
    base = base_of(model)
    if not hasattr(base, "dpo_stock_attention"):
        base.dpo_stock_attention = base.config._attn_implementation
    base.dpo_layout = layout
    base.set_attn_implementation(attention.NAME if layout == "shared" else base.dpo_stock_attention)
