"""The language-model head on scored positions alone, a chunk at a time: logits are never kept.

Every loss of the DPO family depends on the policy only through log-probabilities of tokens, so the gradient at a
hidden row is a number times the row's *unit gradient* d logp / d x = (onehot(y) - softmax(z)) W, which needs no
knowledge of the loss. With a frozen head it is formed in the forward sweep, while the chunk's logits are at hand,
and the backward pass is a row scale. With a trainable head the logits are recomputed per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_lightning.model.products import product_dtype

# Logits at a time: as few as leave the matrix product near its full speed. 50 MB in float32 on a CPU, 270 MB on a GPU.
TILE = {"cpu": 256 * 49_152, "cuda": 2**26}
# The fields of transformers' configs that change logits: Cohere's, Muse's, Falcon-H1's; Granite's, Inkling's; Gemma's,
# RecurrentGemma's, xLSTM's.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def chunk_rows(vocabulary: int, device: str = "cpu") -> int:
    """Return how many rows of logits are made at a time on a kind of device.

    >>> chunk_rows(49_152), chunk_rows(256_000), chunk_rows(256_000, "cuda")
    (256, 64, 256)
    """
    return max(64, TILE["cpu" if device == "cpu" else "cuda"] // vocabulary // 64 * 64)


@dataclass(frozen=True)
class LogitRule:
    """What a model does to x W^T before the softmax: times `scale`, then cap tanh(z / cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Read the rule from a transformers config, where each family has its own names for it."""
        scale = 1.0
        for key in FACTORS:
            scale *= getattr(config, key, None) or 1.0
        for key in DIVISORS:
            scale /= getattr(config, key, None) or 1.0
        return cls(scale, next((cap for key in CAPS if (cap := getattr(config, key, None))), None))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the float32 logits that the softmax sees."""
        logits = logits.float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def apply_(self, logits: Tensor) -> Tensor:
        """Do the same in place on float32 logits, outside autograd."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Multiply `gradient` by d apply(z) / d z in place, given apply(z); `logits` is spent."""
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


class LinearLogp(torch.autograd.Function):
    """log softmax(rule(x W^T))[y] of each row, for x (S, H), W (V, H) and y (S,); returns float32 (S,)."""

    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, weight_VH: Tensor, y_S: Tensor, rule: LogitRule, chunk: int) -> Tensor:
        """Sweep over chunks of rows; keep the unit gradients where the head is frozen, the inputs where it trains."""
        ctx.rule, ctx.chunk = rule, chunk
        need_x, ctx.need_weight = ctx.needs_input_grad[:2]
        with_unit = need_x and not ctx.need_weight
        unit_SH = torch.empty_like(x_SH) if with_unit else None
        logp_S = torch.empty(len(x_SH), dtype=torch.float32, device=x_SH.device)
        for start in range(0, len(x_SH), chunk):
            part = slice(start, start + chunk)
            logits = rule.apply_((x_SH[part] @ weight_VH.T).float())
            logps = logits.log_softmax(1)
            logp_S[part] = logps.gather(1, y_S[part, None])[:, 0]
            if unit_SH is not None:
                unit_SH[part] = (
                    _unit_logit_gradient(logps, logits, y_S[part, None], rule).to(weight_VH.dtype) @ weight_VH
                )
        ctx.save_for_backward(*((x_SH, weight_VH, y_S) if ctx.need_weight else (unit_SH,)))
        return logp_S

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the unit gradients, or recompute each chunk's logits for the gradients of rows and weight."""
        if not ctx.need_weight:
            (unit_SH,) = ctx.saved_tensors
            return unit_SH * grad_S[:, None].to(unit_SH.dtype), None, None, None, None
        x_SH, weight_VH, y_S = ctx.saved_tensors
        exact = torch.promote_types(weight_VH.dtype, torch.float32)  # 250 sums rounded to bfloat16 would lose the small
        grad_x, grad_weight = torch.empty_like(x_SH), torch.zeros_like(weight_VH, dtype=exact)
        for start in range(0, len(x_SH), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = ctx.rule.apply_((x_SH[part] @ weight_VH.T).float())
            unit = _unit_logit_gradient(logits.log_softmax(1), logits, y_S[part, None], ctx.rule)
            grad_logits = unit.mul_(grad_S[part, None]).to(weight_VH.dtype)
            grad_x[part] = grad_logits @ weight_VH
            grad_weight += grad_logits.T @ x_SH[part]
        return grad_x, grad_weight.to(weight_VH.dtype), None, None, None


def _unit_logit_gradient(logps: Tensor, logits: Tensor, target: Tensor, rule: LogitRule) -> Tensor:
    """Return d logp / d z, shape (rows, V): onehot - softmax, times the rule's slope. Both tensors are spent."""
    gradient = logps.exp_().neg_()
    gradient.scatter_add_(1, target, torch.ones_like(target, dtype=gradient.dtype))
    return rule.slope_(gradient, logits)


def install_scoring(model: Any) -> nn.Module:
    """Teach the model's head to be called as head(x_SH, y_S) -> logps_S, besides head(x) -> logits; return it.

    Through the module, so that whatever hooks it carries (ZeRO-3's gathering of sharded weights) run as ever.
    """
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not hasattr(head, "logits"):
        head.logits = head.forward
        head.rule, head.vocabulary = LogitRule.of(config), config.vocab_size  # ZeRO-3 leaves the weight no shape
        head.forward = MethodType(_logits_or_logps, head)  # not a closure: a deep copy is to use its own weight
    return head


def _logits_or_logps(head: Any, x: Tensor, y_S: Tensor | None = None) -> Tensor:
    return head.logits(x) if y_S is None else _score(head, x, y_S)


def _score(head: Any, x_SH: Tensor, y_S: Tensor) -> Tensor:
    kind, rule, logits = x_SH.device.type, head.rule, head.logits
    rows = chunk_rows(head.vocabulary, kind)
    if type(head) is nn.Linear and head.bias is None:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        wide = product_dtype(dtype, kind)
        with torch.autocast(kind, enabled=False):  # it has done its part
            return LinearLogp.apply(x_SH.to(dtype).to(wide), head.weight.to(dtype).to(wide), y_S, rule, rows)

    def logp(x: Tensor, y: Tensor) -> Tensor:  # a bias or an adapter on the head: plain autograd, recomputed
        scores = rule.apply(logits(x))
        return scores.gather(1, y[:, None])[:, 0] - scores.logsumexp(1)

    parts = zip(x_SH.split(rows), y_S.split(rows), strict=True)
    return torch.cat([checkpoint(logp, x, y, use_reentrant=False) for x, y in parts])
