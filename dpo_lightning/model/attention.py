"""Attention within segments of a packed row: which keys each query sees, and the ways to compute it.

On CUDA in 16 bits one variable-length call, flash-attn's where it is installed, else PyTorch's own; in float32
PyTorch's fused attention segment by segment. On the CPU batched matrix products, block by block: at the lengths of
preference pairs the fused CPU kernel takes twice as long (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import AttentionInterface

NAME = "dpo_shared_prefix"
# torch 2.11 lets heads share keys without being asked, later ones if they are.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
WINDOWS: set[int | None] = set()  # that layers have asked for, so that a probe can tell which do
BLOCK = 256  # queries of a segment at a time: bounds the scores at hand, and skips keys that lie ahead
KEPT = 320  # keys: weights of a block with no more wait for the backward pass, others are computed again


@dataclass(frozen=True)
class Segments:
    """Which keys each query sees: segment i's queries are ends_q[i]:ends_q[i+1] of the row, its keys ends_k[i]:...

    of the gathered keys row[keys_K]. Within a segment, query j sees the keys up to j + (keys - queries).
    """

    ends_q: list[int]
    ends_k: list[int]
    keys_K: Tensor
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield each segment's queries in the row and keys in the gathered keys."""
        for (a, b), (c, d) in zip(pairwise(self.ends_q), pairwise(self.ends_k), strict=True):
            yield slice(a, b), slice(c, d)

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Return which keys each query sees, bool (queries, keys); `window` is the number of keys in sight."""
        key = (queries, keys, window)
        if key not in self.masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.keys_K.device)
            seen = ones.tril(keys - queries)
            self.masks[key] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self.masks[key]

    def bias(self, block: Block, rule: ScoreRule) -> Tensor:
        """Return what is added to the scores of a block's last keys: 0 where a key is seen, else -inf."""
        queries, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
        if rule.window is None:
            keys = queries  # all see the keys before
        key = (queries, keys, rule.window, "bias")
        if key not in self.masks:
            seen = self.mask(queries, keys, rule.window)
            self.masks[key] = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
        return self.masks[key]

    @cached_property
    def longest(self) -> int:
        """Return the most keys of a segment."""
        return max(b - a for a, b in pairwise(self.ends_k))

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, int, int]:
        """Return what a variable-length call wants: ends of queries and of keys, the most of each in a segment."""
        q, k = (torch.tensor(ends, dtype=torch.int32, device=self.keys_K.device) for ends in (self.ends_q, self.ends_k))
        return q, k, max(b - a for a, b in pairwise(self.ends_q)), self.longest


class ScoreRule(NamedTuple):
    """What becomes of q k^T before the softmax: times `scale`, then `cap` tanh(s / cap), then the window."""

    scale: float
    window: int | None
    cap: float | None


class Block(NamedTuple):
    """Queries `rows` of the row and the gathered keys `keys` that at least one of them sees."""

    rows: slice
    keys: slice


def blocks(segments: Segments, window: int | None) -> Iterator[Block]:
    """Yield every segment's blocks of queries, in order."""
    for q, k in segments:
        ahead = (k.stop - k.start) - (q.stop - q.start)  # keys that the segment's first query sees besides its own
        for a in range(q.start, q.stop, BLOCK):
            b = min(a + BLOCK, q.stop)
            first = 0 if window is None else max(0, ahead + a - q.start - window + 1)
            yield Block(slice(a, b), slice(k.start + first, k.start + ahead + b - q.start))


class BlockAttention(torch.autograd.Function):
    """Attention by batched matrix products; see KEPT for what the backward pass computes again.

    query (T, heads, d), key and value (T, kv heads, d); returns (T, heads, d).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: ScoreRule
    ) -> Tensor:  # fmt: skip
        """Go through the blocks; keep the inputs, and the weights of small blocks."""
        ctx.segments, ctx.rule = segments, rule
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        v = value.index_select(0, segments.keys_K).transpose(0, 1)
        probs_of = _Probs(query, key, segments, rule)
        kept: list[Tensor] = []
        for block in blocks(segments, rule.window):
            probs, _ = probs_of(block)
            _ungroup(probs @ v[:, block.keys], out[block.rows])
            if any(ctx.needs_input_grad) and _is_kept(block, rule):
                kept.append(probs)
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Add up the gradients of keys and values over the blocks that see them, in float32."""
        query, key, value, *saved = ctx.saved_tensors
        segments, rule, kept = ctx.segments, ctx.rule, iter(saved)
        grad_q = torch.empty_like(query, memory_format=torch.contiguous_format)
        dtype, exact, tokens = key.dtype, _exact(key), len(key)
        k, v = (x.index_select(0, segments.keys_K).transpose(0, 1) for x in (key, value))
        grad_k, grad_v = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        probs_of = _Probs(query, key, segments, rule)
        for block in blocks(segments, rule.window):
            rows, keys = block
            q, g = _group(query[rows], len(k), dtype), _group(grad[rows], len(k), dtype)
            probs, slope = (next(kept), None) if _is_kept(block, rule) else probs_of(block)
            grad_v[:, keys] += probs.mT @ g
            scores = torch.ops.aten._softmax_backward_data(g @ v[:, keys].mT, probs, -1, dtype)
            scores = scores if slope is None else scores.mul_(slope)
            _ungroup(_scaled(rule.scale, scores, k[:, keys]), grad_q[rows])
            grad_k[:, keys] += scores.mT @ q
        grad_k *= rule.scale
        both = (x.new_zeros(len(x), tokens, x.shape[2]).index_add_(1, segments.keys_K, x) for x in (grad_k, grad_v))
        return grad_q, *(x.transpose(0, 1).to(dtype) for x in both), None, None


def _is_kept(block: Block, rule: ScoreRule) -> bool:
    """Return whether the weights of a block wait for the backward pass; under a cap it needs their slopes, too."""
    return rule.cap is None and block.keys.stop - block.keys.start <= KEPT


class _Probs:
    """The attention weights of one block after the other; gathers the keys when they are first asked for."""

    def __init__(self, query: Tensor, key: Tensor, segments: Segments, rule: ScoreRule):
        self.query, self.key, self.segments, self.rule = query, key, segments, rule

    @cached_property
    def keys(self) -> Tensor:
        """Return the gathered keys (kv heads, K, d) in the dtype of scores."""
        return self.key.index_select(0, self.segments.keys_K).to(_exact(self.key)).transpose(0, 1)

    def __call__(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Return the weights (kv heads, group * queries, keys), and the scores' slope where a cap bends them."""
        rule, slope = self.rule, None
        k = self.keys[:, block.keys]
        q = _group(self.query[block.rows], len(k), k.dtype)
        scores = _scaled(rule.scale, q, k.mT)
        if rule.cap is not None:
            bent = scores.div_(rule.cap).tanh_()
            slope = 1 - bent.square()
            scores = bent.mul_(rule.cap)
        bias = self.segments.bias(block, rule)
        scores.view(len(q), -1, len(bias), scores.shape[2])[..., -bias.shape[1] :].add_(bias)
        return scores.softmax(-1).to(self.key.dtype), slope


def _exact(x: Tensor) -> torch.dtype:
    """Return the dtype of scores: rounded to bfloat16 they would cost three times the error of all other roundings."""
    return torch.promote_types(x.dtype, torch.float32)


def _group(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Put the heads that share keys into one matrix: (queries, heads, d) -> (kv heads, group * queries, d)."""
    queries, heads, d = x.shape
    grouped = x.view(queries, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3)
    return torch.empty_like(grouped, dtype=dtype, memory_format=torch.contiguous_format).copy_(grouped).flatten(1, 2)


def _ungroup(x: Tensor, out: Tensor) -> None:
    """Write the inverse of `_group` into `out`."""
    queries, heads, d = out.shape
    kv_heads = x.shape[0]
    out.view(queries, kv_heads, heads // kv_heads, d).copy_(
        x.view(kv_heads, heads // kv_heads, queries, d).permute(2, 0, 1, 3)
    )


def _scaled(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """Return scale a b of batched matrices; the product itself scales."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, segments: Segments,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within segments: query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, T, heads, d).

    The signature is transformers' attention interface; `segments` arrives through the model call's keywords.
    """
    assert not dropout, "attention dropout is off in every model this project loads"
    WINDOWS.add(sliding_window)  # a layer of Gemma or Mistral without one says None
    window = None if sliding_window is None or sliding_window >= segments.longest else sliding_window
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    # Autocast lowers the inputs of attention, as it does here; it must not lower the scores within.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return _attend(q, k, v, segments, rule)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Go the way that `way` says; q (T, heads, d), k and v (T, kv heads, d) -> (T, heads, d)."""
    chosen = way(q.device.type, q.dtype)
    if chosen == "blocks" or (chosen != "flash-attn" and rule.cap is not None):
        return BlockAttention.apply(q, k, v, segments, rule)
    k, v = (x.index_select(0, segments.keys_K) for x in (k, v))
    return WAYS[chosen](q, k, v, segments, rule)


def way(device: str, dtype: torch.dtype) -> str:
    """Return how attention is computed on a kind of device; where scores are capped, flash-attn or blocks do it."""
    if device == "cpu":
        return "blocks"
    if dtype not in (torch.bfloat16, torch.float16):
        return "fused"
    return "varlen" if _flash_attn() is None else "flash-attn"


def varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attend with PyTorch's variable-length kernel, the keys gathered: k and v (K, kv heads, d)."""
    window = -1 if rule.window is None else rule.window - 1
    return varlen_attn(q, k, v, *segments.varlen, scale=rule.scale, window_size=(window, 0), **GROUPED)  # type: ignore[return-value]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attend with flash-attn's variable-length kernel, which caps scores too; shapes as for `varlen`."""
    window = -1 if rule.window is None else rule.window - 1
    rest = {"causal": True, "window_size": (window, 0), "softcap": rule.cap or 0.0}
    rest["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return _flash_attn()(q, k, v, *segments.varlen, softmax_scale=rule.scale, **rest)


def fused(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attend segment by segment with PyTorch's fused kernels, the keys gathered: k and v (K, kv heads, d)."""
    parts = []
    for rows, keys in segments:
        one = [x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys])]
        queries, seen = one[0].shape[2], one[1].shape[2]
        window = None if rule.window is None or rule.window >= seen else rule.window
        plain = queries == seen and window is None
        parts.append(
            F.scaled_dot_product_attention(
                *one, attn_mask=None if plain else segments.mask(queries, seen, window), is_causal=plain,
                scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)
        )  # fmt: skip
    return torch.cat(parts)


@cache
def _flash_attn() -> Any:
    """Return flash-attn's variable-length function where it is installed, else None."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


WAYS = {"fused": fused, "varlen": varlen, "flash-attn": flash_attn}

# No mask function is registered under this name, so transformers builds no mask; it would read the restarting
# positions as packed documents and hide the prompt from the rejected branch.
AttentionInterface.register(NAME, attend)
