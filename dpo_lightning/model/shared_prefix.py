"""The compact layout: prompt | chosen | rejected of every pair in one row, each prompt once, no padding.

All of the trunk but attention works token by token, so it needs no change. Attention is un-shared here: a pair
becomes two segments, queries [prompt chosen] with keys [prompt chosen], and queries [rejected] with keys
[prompt rejected], both causal with their ends aligned. Queries stay where they are; keys and values are gathered.
The idea is https://arxiv.org/abs/2410.20305's, in a form that needs stock attention kernels alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from dpo_lightning.types import Batch

NAME = "dpo_shared_prefix"


@dataclass(frozen=True)
class Segments:
    """Which keys each query sees: segment i's queries are ends_q[i]:ends_q[i+1] of the row, its keys ends_k[i]:...

    of the gathered keys. Within a segment, query j sees the keys up to j + (keys - queries).
    """

    ends_q: list[int]
    ends_k: list[int]
    keys_K: Tensor
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Return which keys each query sees, bool (queries, keys); `window` is the number of keys in sight."""
        key = (queries, keys, window)
        if key not in self.masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.keys_K.device)
            seen = ones.tril(keys - queries)
            self.masks[key] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self.masks[key]

    @cached_property
    def varlen(self) -> dict[str, Any]:
        """Return the arguments of one variable-length flash-attention call."""
        ends = [torch.tensor(e, dtype=torch.int32, device=self.keys_K.device) for e in (self.ends_q, self.ends_k)]
        longest = [max(b - a for a, b in pairwise(e)) for e in (self.ends_q, self.ends_k)]
        return {
            "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
        }  # fmt: skip


def scored_rows(trunk: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the hidden rows (S, H) that predict a completion token, and those tokens (S,).

    Ordered by pair, chosen before rejected. The prompt's last row predicts both first tokens.
    """
    device = batch.ids_T.device
    positions_T, rows_S, targets_S, segments = plan(batch.lengths_B3, device)
    hidden = trunk(
        input_ids=batch.ids_T[None], position_ids=positions_T[None], use_cache=False, segments=segments
    ).last_hidden_state
    return hidden[0][rows_S], batch.ids_T[targets_S]


def plan(lengths_B3: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Return positions, rows to score, their targets' places in the row, and the attention's segments.

    >>> positions, rows, targets, segments = plan(torch.tensor([[2, 1, 2], [1, 1, 1]]), torch.device("cpu"))
    >>> positions.tolist(), rows.tolist(), targets.tolist()
    ([0, 1, 2, 2, 3, 0, 1, 1], [1, 1, 3, 5, 5], [2, 3, 4, 6, 7])
    >>> segments.ends_q, segments.ends_k, segments.keys_K.tolist()
    ([0, 3, 5, 7, 8], [0, 3, 7, 9, 11], [0, 1, 2, 0, 1, 3, 4, 5, 6, 5, 7])
    """
    positions, rows, targets, keys = [], [], [], []
    ends_q, ends_k = [0], [0]
    start = 0
    for p, c, r in lengths_B3.tolist():
        chosen, rejected, end = start + p, start + p + c, start + p + c + r
        positions += [torch.arange(p + c), torch.arange(p, p + r)]
        last = torch.tensor([chosen - 1])
        rows += [last, torch.arange(chosen, rejected - 1), last, torch.arange(rejected, end - 1)]
        targets.append(torch.arange(chosen, end))
        keys += [torch.arange(start, rejected), torch.arange(start, chosen), torch.arange(rejected, end)]
        ends_q += [rejected, end]
        ends_k += [ends_k[-1] + p + c, ends_k[-1] + p + c + p + r]
        start = end
    tensors = (torch.cat(parts).to(device, non_blocking=True) for parts in (positions, rows, targets, keys))
    positions_T, rows_S, targets_S, keys_K = tensors
    return positions_T, rows_S, targets_S, Segments(ends_q, ends_k, keys_K)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, segments: Segments,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within segments: query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, T, heads, d).

    The signature is transformers' attention interface; `segments` arrives through the model call's keywords.
    """
    assert not dropout, "attention dropout is off in every model this project loads"
    # A layer of Gemma or Mistral without a window says None; some say it in the module alone.
    key, value = key[:, :, segments.keys_K], value[:, :, segments.keys_K]
    if query.is_cuda and (flash := _flash_attention(query.dtype)) is not None:
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        out = flash(
            *(x[0].transpose(0, 1) for x in (query, key, value)), **segments.varlen, softmax_scale=scaling,
            causal=True, window_size=window, softcap=softcap or 0.0,
        )  # fmt: skip
        return out[None], None
    parts = []
    for i in range(len(segments.ends_q) - 1):
        q = query[:, :, segments.ends_q[i] : segments.ends_q[i + 1]]
        k, v = (x[:, :, segments.ends_k[i] : segments.ends_k[i + 1]] for x in (key, value))
        parts.append(_attend_one(q, k, v, segments, scaling, sliding_window, softcap).transpose(1, 2))
    return torch.cat(parts, 1), None


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attend in one segment, -> (1, heads, queries, d)."""
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        plain = queries == keys and window is None
        mask = None if plain else segments.mask(queries, keys, window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * (scaling if scaling is not None else q.shape[3] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~segments.mask(queries, keys, window), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def _flash_attention(dtype: torch.dtype) -> Any:
    """Return flash-attn's variable-length function where it is installed and takes `dtype`, else None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


# No mask function is registered under this name, so transformers builds no mask; it would read the restarting
# positions as packed documents and hide the prompt from the rejected branch.
AttentionInterface.register(NAME, attend)
