"""Attention within segments of a packed row as transformers calls it, and the kernels that compute it.

On CUDA in 16 bits one variable-length call, flash-attn's where it is installed, else PyTorch's own; in float32
PyTorch's fused attention segment by segment. On the CPU ours, block by block.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import AttentionInterface

from dpo_lightning.model.block_attention import BlockAttention
from dpo_lightning.model.products import product_dtype
from dpo_lightning.model.repeatable import repeatable
from dpo_lightning.model.segments import ScoreRule, Segments

NAME = "dpo_shared_prefix"
# torch 2.11 lets heads share keys without being asked, later ones if they are.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
WINDOWS: Counter[int | None] = Counter()  # that layers have asked for, so that a probe can tell which did
KNOWN = {"position_ids", "read_R"}  # tensors among a layer's keywords that are not attention's business


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    segments: Segments | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within segments: query (1, heads, T, d), key (1, kv heads, T, d), value (.., e <= d) -> (1, T, heads, e).

    The signature is transformers' attention interface; `segments` arrives through the model call's keywords.

    Raises NotImplementedError if the layer wants more, such as attention sinks (`s_aux`), chosen keys (`indices`) or
    Doge's own mask: left out, they may change less than 16 bits resolve, or only what is longer than a probe.
    """
    if segments is None:
        raise NotImplementedError("its layers do not hand keywords on to attention")
    assert not dropout, "attention dropout is off in every model this project loads"
    if attention_mask is not None:
        raise NotImplementedError("its attention takes its own mask")
    if more := [name for name, given in kwargs.items() if isinstance(given, Tensor) and name not in KNOWN]:
        raise NotImplementedError(f"its attention takes {more[0]}")
    WINDOWS[sliding_window] += 1  # a layer of Gemma or Mistral without one says None
    window = None if sliding_window is None or sliding_window >= segments.longest else sliding_window
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    # Autocast lowers the inputs of attention, as it does here; it must not lower the scores within.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype).to(product_dtype(dtype, kind)) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return _attend(q, k, v, segments, rule).to(dtype)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: ScoreRule) -> Tensor:
    """Attend: q (T, heads, d), k (T, kv heads, d), v (T, kv heads, e <= d) -> (T, heads, e)."""
    if (width := v.shape[2]) < q.shape[2]:  # latent attention, DeepSeek's; kernels want keys and values of one width
        return _attend(q, k, F.pad(v, (0, q.shape[2] - width)), segments, rule)[..., :width]
    name = kernel_for(q.device.type, q.dtype, rule.cap is not None)
    if name == "blocks":
        return BlockAttention.apply(q, k, v, segments, rule)
    k, v = (x.index_select(0, segments.keys_K) for x in (k, v))
    kernel = partial(KERNELS[name], segments=segments, rule=rule)
    return kernel(q, k, v) if name == "flash-attn" else repeatable(kernel, q, k, v)  # that one is told by an argument


def kernel_for(device: str, dtype: torch.dtype, capped: bool = False) -> str:
    """Return what computes attention on a kind of device; of the others flash-attn alone caps scores."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device != "cpu" and half and _flash_attn() is not None:
        return "flash-attn"
    if device == "cpu" or capped:
        return "blocks"
    return "varlen" if half else "fused"


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


KERNELS = {"fused": fused, "varlen": varlen, "flash-attn": flash_attn}

# No mask function is registered under this name, so transformers builds no mask; it would read the restarting
# positions as packed documents and hide the prompt from the rejected branch.
AttentionInterface.register(NAME, attend)
