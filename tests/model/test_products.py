"""Products of bfloat16 matrices in float32, where a processor would emulate them: the same numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lightning.model import products
from dpo_lightning.model.layout import probe, set_layout
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.model.lora import add_lora
from dpo_lightning.model.products import add_product_, product, product_dtype
from tests.model.test_layout import model_of


@pytest.fixture(params=[False, True], ids=["native", "emulated"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", request.param)
    return request.param


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0] in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def matrices(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_rounded_once(emulated, dtype):
    a, b, bias, out = matrices(dtype, (20, 30), (30, 10), (10,), (20, 10))
    exact = a.double() @ b.double()
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for found, expected in (
        (product(a, b), exact),
        (product(a, b, bias), exact + bias.double()),
        (add_product_(out.clone(), a, b), exact + out.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=1e-5)


def test_only_bfloat16_on_the_cpu_is_widened(monkeypatch):
    monkeypatch.setattr(products, "EMULATED", True)
    assert product_dtype(torch.bfloat16, "cpu") == torch.float32
    assert product_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert product_dtype(torch.float64, "cpu") == torch.float64
    monkeypatch.setattr(products, "EMULATED", False)
    assert product_dtype(torch.bfloat16, "cpu") == torch.bfloat16


def test_no_product_in_bfloat16_is_left_in_a_training_with_lora(monkeypatch):
    """Nor in its reference: one that is left, in a backward pass above all, would take longer than all others."""
    monkeypatch.setattr(products, "EMULATED", True)
    model = add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    set_layout(model, "shared")
    pair_logps(model, probe(97, torch.device("cpu")))
    seen = Products()
    with seen:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
                pair_logps(model, probe(97, torch.device("cpu")))
            out = pair_logps(model, probe(97, torch.device("cpu")))
        (out.chosen - out.rejected).sum().backward()
    assert seen.dtypes == {torch.float32}


def test_a_training_step_in_bfloat16_is_the_same_within_its_rounding(monkeypatch):
    model = add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    set_layout(model, "shared")
    found = []
    for emulated in (False, True):
        monkeypatch.setattr(products, "EMULATED", emulated)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = pair_logps(model, probe(97, torch.device("cpu")))
        (out.chosen - out.rejected).sum().backward()
        found.append((out.chosen, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (logps, gradient), (other_logps, other_gradient) = found
    torch.testing.assert_close(other_logps, logps, rtol=0.02, atol=0.05)
    assert (other_gradient - gradient).norm() < 0.05 * gradient.norm()
