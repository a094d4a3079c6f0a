"""Attention within segments by batched matrix products, block by block: what a CPU uses, and a model that caps scores.

At the lengths of preference pairs PyTorch's fused CPU kernel takes twice as long (docs/performance.md).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.model.segments import Block, ScoreRule, Segments, blocks

KEPT = 320  # keys: weights of a block with no more wait for the backward pass, others are computed again


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
    """The attention weights of one block after the other; gathers the keys when they are first asked for.

    All blocks' scores are made in one place, which stays in the processor's cache.
    """

    def __init__(self, query: Tensor, key: Tensor, segments: Segments, rule: ScoreRule):
        self.query, self.key, self.segments, self.rule = query, key, segments, rule

    @cached_property
    def keys(self) -> Tensor:
        """Return the gathered keys (kv heads, K, d) in the dtype of scores."""
        return self.key.index_select(0, self.segments.keys_K).to(_exact(self.key)).transpose(0, 1)

    @cached_property
    def scores(self) -> Tensor:
        """Return room for the scores of the largest block."""
        largest = max(
            (b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in blocks(self.segments, self.rule.window)
        )
        return self.query.new_empty(largest * self.query.shape[1], dtype=_exact(self.key))

    def __call__(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Return the weights (kv heads, group * queries, keys), and the scores' slope where a cap bends them."""
        rule, slope = self.rule, None
        k = self.keys[:, block.keys]
        q = _group(self.query[block.rows], len(k), k.dtype)
        scores = self.scores[: len(k) * q.shape[1] * k.shape[1]].view(len(k), q.shape[1], k.shape[1])
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=rule.scale, out=scores)
        if rule.cap is not None:
            bent = scores.div_(rule.cap).tanh_()
            slope = 1 - bent.square()
            scores = bent.mul_(rule.cap)
        bias = self.segments.bias(block, rule)
        scores.view(len(q), -1, len(bias), scores.shape[2])[..., -bias.shape[1] :].add_(bias)
        if scores.dtype == self.key.dtype:
            return scores.softmax(-1), slope
        return torch.softmax(scores, -1, out=scores).to(self.key.dtype), slope


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
