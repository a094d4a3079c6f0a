"""Attention within segments, against the definition: softmax of masked scores, one sequence at a time."""

import pytest
import torch

from dpo_lightning.model import attention, block_attention, segments
from dpo_lightning.model.attention import attend, fused, kernel_for
from dpo_lightning.model.block_attention import BlockAttention
from dpo_lightning.model.segments import ScoreRule
from dpo_lightning.model.shared_prefix import plan

LENGTHS = torch.tensor([[11, 5, 9], [6, 12, 3], [4, 1, 1]])
RULES = [(None, None), (6, None), (None, 2.0), (3, 2.0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(segments, "BLOCK", 4)
    monkeypatch.setattr(block_attention, "KEPT", 12)  # of up to 20


def inputs(opening, heads=4, kv_heads=2, d=8, dtype=torch.float32):
    torch.manual_seed(0)
    row = plan(LENGTHS, opening, torch.device("cpu"))
    make = [torch.randn(len(row.tokens_T), n, d, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    return row, make, torch.randn(len(row.tokens_T), heads, d, dtype=dtype)


def by_definition(row, q, k, v, rule):
    """Each query sees the row's tokens of its own pair that its sequence holds, itself the last."""
    out = []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for rows, keys in row.segments:
        seen = row.segments.keys_K[keys]
        for place in range(rows.start, rows.stop):
            upto = seen[row.positions_T[seen] <= row.positions_T[place]]
            if rule.window is not None:
                upto = upto[row.positions_T[upto] > row.positions_T[place] - rule.window]
            scores = torch.einsum("hd,khd->hk", q[place], k[upto]) * rule.scale
            if rule.cap is not None:
                scores = rule.cap * torch.tanh(scores / rule.cap)
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[upto]))
    return torch.stack(out)


@pytest.mark.parametrize("opening", [0, 3])
@pytest.mark.parametrize(("window", "cap"), RULES)
def test_blocks_equal_the_definition(window, cap, opening):
    row, (q, k, v), g = inputs(opening)
    rule = ScoreRule(0.3, window, cap)
    expected = by_definition(row, q, k, v, rule)
    out = BlockAttention.apply(q, k, v, row.segments, rule)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(o, (q, k, v), g, retain_graph=True) for o in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize(("window", "cap"), RULES)
def test_blocks_in_16_bits_are_within_their_rounding_of_the_definition(window, cap):
    """There all blocks' scores and weights are made in one place, one block after the other."""
    row, (q, k, v), g = inputs(3, dtype=torch.bfloat16)
    rule = ScoreRule(0.3, window, cap)
    out = BlockAttention.apply(q, k, v, row.segments, rule)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = by_definition(row, exact[0], exact[1], exact[2], rule)
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.01)
    ours, theirs = (torch.autograd.grad(o, x, h) for o, x, h in ((out, (q, k, v), g), (expected, exact, g.float())))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


def test_what_many_pairs_add_to_the_gradient_of_one_opening_is_summed_in_float32():
    torch.manual_seed(0)
    row = plan(LENGTHS.repeat(64, 1), 3, torch.device("cpu"))
    make = [torch.randn(len(row.tokens_T), heads, 8).bfloat16() for heads in (4, 2, 2)]
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in make)
        out = BlockAttention.apply(q, k, v, row.segments, ScoreRule(0.3, None, None))
        grads.append(torch.autograd.grad(out, (k, v), torch.ones_like(out)))
    for one, other in zip(*grads, strict=True):
        assert (one.float() - other)[:3].norm() < 0.005 * other[:3].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_kept_and_those_computed_again_give_the_same_bits(dtype, monkeypatch):
    row, (q, k, v), g = inputs(3, dtype=dtype)
    found, sizes = [], []
    for limit in (0, 12, 100):
        monkeypatch.setattr(block_attention, "KEPT", limit)
        out = BlockAttention.apply(q, k, v, row.segments, ScoreRule(0.3, None, None))
        sizes.append([x.shape[-1] for x in out.grad_fn.saved_tensors[3:]])
        found.append(torch.autograd.grad(out, (q, k, v), g))
    assert sizes[0] == [] and max(sizes[1]) <= 12 < max(sizes[2])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("window", "cap"), RULES[:2])
def test_the_fused_kernel_of_cuda_equals_the_definition(window, cap):
    row, (q, k, v), _ = inputs(3)
    rule = ScoreRule(0.3, window, cap)
    out = fused(q, k[row.segments.keys_K], v[row.segments.keys_K], row.segments, rule)
    torch.testing.assert_close(out, by_definition(row, q, k, v, rule), atol=2e-6, rtol=0)


def test_a_training_that_only_warns_differentiates_attention_deterministically(monkeypatch):
    """Each kernel's backward pass on CUDA gives other bits each time unless PyTorch is told to fail otherwise."""
    modes = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            modes.append(torch.get_deterministic_debug_mode())
            return grad

    monkeypatch.setattr(attention, "kernel_for", lambda *given: "noted")
    monkeypatch.setitem(attention.KERNELS, "noted", lambda *args, **rest: Noted.apply(fused(*args, **rest)))
    row, (q, k, v), g = inputs(3)
    found = {}
    for mode in ("default", "warn", "error"):
        torch.set_deterministic_debug_mode(mode)
        try:
            out = attention._attend(q, k, v, row.segments, ScoreRule(0.3, None, None))
            found[mode] = out, *torch.autograd.grad(out, (q, k, v), g)
            assert torch.get_deterministic_debug_mode() == ("default", "warn", "error").index(mode)
        finally:
            torch.set_deterministic_debug_mode("default")
    assert modes == [0, 2, 2]
    for mode in ("warn", "error"):
        assert all(torch.equal(a, b) for a, b in zip(found[mode], found["default"], strict=True))


@pytest.mark.parametrize(("name", "cap"), [("varlen", None), ("flash-attn", None), ("flash-attn", 2.0)])
@pytest.mark.parametrize("window", [None, 6, 100])
def test_a_variable_length_call_gets_the_same_segments(window, name, cap, monkeypatch):
    """The contract of both kernels (causal, ends aligned), each in its own argument names; tests/gpu has PyTorch's."""
    row, (q, k, v), _ = inputs(3)

    def call(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, **more):
        assert (longest_q, longest_k, window_size[1]) == (15, 20, 0)
        own = {"scale": 8**-0.5, "enable_gqa": True}
        rest = {"softmax_scale": 8**-0.5, "causal": True, "softcap": cap or 0.0, "deterministic": False}
        assert more == (own if name == "varlen" else rest)
        out = []
        for i in range(len(ends_q) - 1):
            qs, ks = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
            ahead = (ks.stop - ks.start) - (qs.stop - qs.start)
            for j in range(qs.stop - qs.start):
                first = ks.start + (max(0, ahead + j - window_size[0]) if window_size[0] >= 0 else 0)
                keys = slice(first, ks.start + ahead + j + 1)
                kk, vv = (x[keys].repeat_interleave(2, 1) for x in (k, v))
                scores = torch.einsum("hd,khd->hk", q[qs.start + j], kk) * 8**-0.5
                weights = (scores if cap is None else cap * torch.tanh(scores / cap)).softmax(-1)
                out.append(torch.einsum("hk,khd->hd", weights, vv))
        return torch.stack(out)

    monkeypatch.setattr(attention, "kernel_for", lambda *given: name)
    monkeypatch.setattr(attention, "varlen_attn", call)
    monkeypatch.setattr(attention, "_flash_attn", lambda: call)
    shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
    rest = {"segments": row.segments, "sliding_window": window, "softcap": cap}
    out, _ = attend(None, shaped[0], shaped[1], shaped[2], None, **rest)
    torch.testing.assert_close(out[0], by_definition(row, q, k, v, ScoreRule(8**-0.5, window, cap)), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("window", "keys"), [(None, [4, 8, 11, 4, 5]), (3, [4, 6, 5, 4, 3])])
def test_blocks_hold_the_keys_that_their_queries_see_and_no_others(window, keys):
    given = segments.Segments([0, 11, 16], [0, 11, 16], torch.arange(16))
    assert [b.keys.stop - b.keys.start for b in segments.blocks(given, window)] == keys


@pytest.mark.parametrize("installed", [False, True])
def test_which_kernel_is_chosen(installed, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn", lambda: print if installed else None)
    for capped in (False, True):
        assert kernel_for("cpu", torch.bfloat16, capped) == "blocks"
    assert kernel_for("cuda", torch.bfloat16) == ("flash-attn" if installed else "varlen")
    assert kernel_for("cuda", torch.bfloat16, True) == ("flash-attn" if installed else "blocks")
    assert kernel_for("cuda", torch.float32) == "fused"
    assert kernel_for("cuda", torch.float32, True) == "blocks"


@pytest.mark.parametrize("rule", [ScoreRule(0.3, None, None), ScoreRule(0.3, 3, 2.0)])
def test_gradients_are_exact(rule):
    row, (q, k, v), _ = inputs(2, heads=2, kv_heads=1, d=3, dtype=torch.float64)

    def attended(q, k, v):
        return BlockAttention.apply(q, k, v, row.segments, rule)

    assert torch.autograd.gradcheck(attended, (q, k, v), fast_mode=True)


def test_bfloat16_is_as_near_as_the_fused_kernel():
    row, make, g = inputs(3, d=64)
    rule, keys = ScoreRule(0.125, None, None), row.segments.keys_K

    def by_fused(q, k, v, *rest):
        return fused(q, k[keys], v[keys], *rest)

    def error(function, dtype):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in make)
        out = function(q, k, v, row.segments, rule)
        return [x.float() for x in (out, *torch.autograd.grad(out, (q, k, v), g.to(dtype)))]

    exact = error(by_fused, torch.float32)
    for ours, theirs, true in zip(
        error(BlockAttention.apply, torch.bfloat16), error(by_fused, torch.bfloat16), exact, strict=True
    ):
        assert (ours - true).norm() < 1.5 * (theirs - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("mixed", [False, True])
def test_under_autocast_the_inputs_are_lowered_and_the_scores_are_not(mixed):
    """In full fine-tuning query and key come out of the rotary embedding in float32, value in bfloat16."""
    row, (q, k, v), g = inputs(3, d=64)
    lowered = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    asis = [x.detach().float().requires_grad_() if mixed and i < 2 else x for i, x in enumerate(lowered)]

    def attended(q, k, v):
        shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return attend(None, shaped[0], shaped[1], shaped[2], None, segments=row.segments)[0][0]

    plain = attended(*lowered)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attended(*asis)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    ours, theirs = torch.autograd.grad(out, asis, g.bfloat16()), torch.autograd.grad(plain, lowered, g.bfloat16())
    assert all(torch.equal(one.bfloat16(), other) for one, other in zip(ours, theirs, strict=True))


def test_transformers_calls_it_with_its_own_shapes():
    row, (q, k, v), _ = inputs(3)
    shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, weights = attend(None, shaped[0], shaped[1], shaped[2], None, segments=row.segments, scaling=None)
    assert weights is None and out.shape == (1, *q.shape)
    torch.testing.assert_close(out[0], by_definition(row, q, k, v, ScoreRule(8**-0.5, None, None)), atol=2e-6, rtol=0)


def test_what_a_layer_wants_besides_is_not_left_out():
    row, (q, k, v), _ = inputs(3)
    shaped = [x.transpose(0, 1)[None] for x in (q, k, v)]
    known = {"segments": row.segments, "position_ids": row.positions_T, "use_cache": False, "s_aux": None}
    attend(None, shaped[0], shaped[1], shaped[2], None, **known)
    with pytest.raises(NotImplementedError, match="its attention takes s_aux"):
        attend(None, shaped[0], shaped[1], shaped[2], None, **{**known, "s_aux": torch.nn.Parameter(torch.zeros(4))})
