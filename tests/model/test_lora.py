"""The adapter's linear layer gives PEFT's own numbers, and leaves to PEFT what it does not compute."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn

from dpo_lightning.model.lora import adapter_off, add_lora
from dpo_lightning.model.lora_linear import AddedProduct, LoraLinear
from dpo_lightning.types import UserError
from tests.model.test_layout import SMALL, model_of

X = torch.randn(2, 7, SMALL["hidden_size"], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    policy = add_lora(model_of("llama", {}), r=4, lora_alpha=12, lora_dropout=0.0, target_modules="all-linear")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return policy


def layer_of(policy):
    return policy.get_base_model().model.layers[0].mlp.gate_proj


def grads(layer, forward, autocast):
    x = X.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = forward(layer, x)
    out.float().square().sum().backward()
    return [out.float(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("stored", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_one_piece_equals_peft(model, stored, autocast, bias):
    layer = layer_of(model)
    layer.base_layer.to(stored)
    if bias:
        layer.base_layer.bias = nn.Parameter(torch.randn(layer.base_layer.out_features), requires_grad=False)
    ours, theirs = grads(layer, LoraLinear.forward, autocast), grads(layer, Linear.forward, autocast)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= (0.02 if autocast else 1e-5) * other.abs().max()


def test_every_adapted_layer_is_ours_and_the_adapter_off_is_the_base(model, monkeypatch):
    adapted = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(adapted) == 4 * 7 and all(type(m) is LoraLinear for m in adapted)
    layer = layer_of(model)
    with adapter_off(model):
        assert torch.equal(layer(X), layer.base_layer(X))
    used = []
    monkeypatch.setattr(AddedProduct, "apply", lambda *args: used.append(args) or nn.functional.linear(*args[:3]))
    layer(X)
    assert len(used) == 1


def test_the_adapter_off_is_pefts_own_and_is_on_again_after_an_error(model):
    ids = torch.arange(1, 9)[None]
    with_it = model(input_ids=ids).logits
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad(), adapter_off(model):
        assert torch.equal(model(input_ids=ids).logits, base) and not torch.equal(base, with_it)
        with adapter_off(model):
            pass
        assert torch.equal(model(input_ids=ids).logits, base)  # the outer one holds still
    with pytest.raises(RuntimeError), adapter_off(model):
        raise RuntimeError
    assert torch.equal(model(input_ids=ids).logits, with_it)


def test_what_is_not_plain_is_left_to_peft(model, monkeypatch):
    layer = layer_of(model)
    monkeypatch.setattr(AddedProduct, "apply", lambda *args: pytest.fail("not this one's to compute"))
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    layer(X)
    layer.lora_dropout["default"] = nn.Identity()
    layer.base_layer.weight.ds_id = 0  # what DeepSpeed marks a sharded weight with
    layer(X)
    del layer.base_layer.weight.ds_id
    layer.base_layer.weight.requires_grad_(True)
    layer(X)
    layer.base_layer.weight.requires_grad_(False)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    layer(X)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    layer(X)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_adapters_are_left_to_peft(kind: dict[str, Any], monkeypatch):
    monkeypatch.setattr(AddedProduct, "apply", lambda *args: pytest.fail("not this one's to compute"))
    config = LoraConfig(r=4, target_modules=["gate_proj"], **kind)
    config._register_custom_module({nn.Linear: LoraLinear})
    policy = get_peft_model(model_of("llama", {}), config)
    layer = layer_of(policy)
    assert type(layer) is LoraLinear
    layer(X)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_proj", "v_porj"], "no layer is called v_porj; there are down_proj, gate_proj, k_proj, lm_head, o_proj,"),
        (["proj"], "no layer is called proj; "),
        ("q_proj", r"no layer is called q_proj \(a text is a regular expression of whole names; \[q_proj\] is a list"),
        ("*proj", "no regular expression .nothing to repeat"),
        (["norm"], "Target module LlamaRMSNorm"),
    ],
)
def test_a_target_that_is_not_there_is_told(targets, told):
    with pytest.raises(UserError, match=f"lora.target_modules.*{told}"):
        add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)


@pytest.mark.parametrize("targets", [["self_attn.q_proj", "lm_head"], r".*\.(q|v)_proj", "all-linear"])
def test_targets_are_named_by_their_ends_or_a_pattern(targets):
    policy = add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    count = {"self_attn.q_proj": 5, "all-linear": 28}.get(targets if isinstance(targets, str) else targets[0], 8)
    assert sum(isinstance(part, Linear) for part in policy.modules()) == count


def test_gradients_are_exact():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4), (3, 2)))
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: AddedProduct.apply(x, weight, bias, a, b, 1.5), (x, a, b))


def test_initial_values_are_the_same_under_any_default_device(model):
    torch.manual_seed(0)
    base = model_of("llama", {})
    with torch.device("meta"):
        policy = add_lora(base, r=4, lora_alpha=12, lora_dropout=0.0, target_modules="all-linear")
    assert torch.equal(layer_of(policy).lora_A["default"].weight, layer_of(model).lora_A["default"].weight)
