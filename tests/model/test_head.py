"""The chunked head against autograd through the full logits."""

import copy

import pytest
import torch
from torch import nn

from dpo_lightning.model import head as module
from dpo_lightning.model.head import LinearLogp, LogitRule

RULES = [LogitRule(), LogitRule(scale=0.25), LogitRule(cap=3.0), LogitRule(scale=2.0, cap=3.0)]


def inputs(trainable: bool, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=dtype).requires_grad_(trainable)
    return x, weight, torch.tensor([0, 3, 10, 3, 7, 1, 2])


def plain(x, weight, y, rule):
    return rule.apply(x @ weight.T).log_softmax(1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainable", [False, True])
def test_equals_autograd_through_the_logits(rule, trainable):
    grads = []
    upstream = torch.linspace(-2, 3, 7)
    for function in (lambda *a: LinearLogp.apply(*a, 3), plain):
        x, weight, y = inputs(trainable, torch.float32)
        out = function(x, weight, y, rule)
        (out * upstream).sum().backward()
        grads.append((out.detach(), x.grad, weight.grad))
    for ours, theirs in zip(*grads, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (grads[0][2] is None) == (not trainable)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trainable", [False, True])
def test_gradcheck_in_float64(rule, trainable, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the sweep is float32 by design
    monkeypatch.setattr(torch, "float32", torch.float64)
    x, weight, y = inputs(trainable)
    assert torch.autograd.gradcheck(lambda x, w: LinearLogp.apply(x, w, y, rule, 3), (x, weight))


@pytest.mark.parametrize("trainable", [False, True])
def test_16_bits_round_products_and_nothing_after_them(trainable):
    """Not the logits' softmax, whose logarithm is 8 times a logit here, nor the sum over 128 chunks of rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 32, generator=generator).bfloat16()
    weight = torch.randn(64, 32, generator=generator).mul_(0.1).bfloat16()
    y, upstream = torch.randint(64, (512,), generator=generator), torch.rand(512, generator=generator)
    found = []
    for dtype, function in ((torch.bfloat16, lambda *a: LinearLogp.apply(*a, 4)), (torch.float32, plain)):
        leaves = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trainable)
        out = function(*leaves, y, LogitRule())
        found.append((out, torch.autograd.grad(out, leaves[: 1 + trainable], upstream)))
    (ours, grads), (exact, expected) = found
    torch.testing.assert_close(ours, exact, atol=0.006, rtol=0)
    for one, other in zip(grads, expected, strict=True):
        assert (one.float() - other).norm() < 0.004 * other.norm()


def test_a_frozen_head_keeps_no_logits():
    x, weight, y = inputs(False, torch.float32)
    out = LinearLogp.apply(x, weight, y, LogitRule(), 3)
    saved = out.grad_fn.saved_tensors
    assert [t.shape for t in saved] == [x.shape]


class Tiny(nn.Module):
    def __init__(self, head, **fields):
        super().__init__()
        self.head = head
        known = {"get_text_config": lambda self: self, "vocab_size": head.out_features, **fields}
        self.config = type("Config", (), known)()

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("fields", [{}, {"logit_scale": 0.5, "final_logit_softcapping": 1.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_the_module_scores_and_still_gives_logits(bias, fields):
    torch.manual_seed(0)
    head = nn.Linear(5, 11, bias=bias)
    before = head(torch.ones(2, 5))
    x, y = torch.randn(7, 5, requires_grad=True), torch.tensor([0, 3, 10, 3, 7, 1, 2])
    scoring = module.install_scoring(Tiny(head, **fields))
    logits = head(x) if not fields else torch.tanh(0.5 * head(x))
    torch.testing.assert_close(scoring(x, y), logits.log_softmax(1).gather(1, y[:, None])[:, 0])
    assert torch.equal(scoring(torch.ones(2, 5)), before)
    scoring(x, y).sum().backward()
    assert x.grad is not None and head.weight.grad is not None


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_few_rows_are_held_at_a_time_and_made_again_for_the_gradient(bias, monkeypatch):
    head = nn.Linear(5, 50_000, bias=bias)
    rows = module.chunk_rows(50_000)
    held = []
    stock = torch.Tensor.log_softmax, torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda z, d: held.append(z.shape) or stock[0](z, d))
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda z, d: held.append(z.shape) or stock[1](z, d))
    x = torch.randn(2 * rows + 1, 5, requires_grad=True)
    logps = module.install_scoring(Tiny(head))(x, torch.zeros(len(x), dtype=torch.long))
    parts = [(rows, 50_000), (rows, 50_000), (1, 50_000)]
    assert held == parts
    logps.sum().backward()
    assert sorted(held) == sorted(2 * parts)


def test_a_deep_copy_scores_with_its_own_weight():
    torch.manual_seed(0)
    head = module.install_scoring(Tiny(nn.Linear(5, 11, bias=False)))
    x, y = torch.randn(3, 5), torch.tensor([0, 3, 10])
    other = copy.deepcopy(head)
    nn.init.normal_(other.get_parameter("weight"))
    torch.testing.assert_close(other(x, y), other(x).log_softmax(1).gather(1, y[:, None])[:, 0])
    assert not torch.equal(other(x), head(x))
