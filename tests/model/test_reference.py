"""The reference is the policy's start, however it is kept."""

import pytest
import torch
from torch import nn

from dpo_lightning.model.layout import probe
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.model.lora import add_lora, no_lora
from dpo_lightning.model.reference import AdapterOff, FrozenCopy, Offloaded, build_reference, visiting
from dpo_lightning.model.source import ModelSource
from dpo_lightning.types import UserError

BATCH = probe(97, torch.device("cpu"))


@pytest.fixture
def load(tmp_path):
    dimensions = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=dimensions)
    return lambda: source.load(torch.float32)


def lora(model):
    return add_lora(model, r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear")


def test_auto_is_adapter_off_with_lora_and_a_frozen_copy_without(load):
    assert isinstance(build_reference(lora(load()), load, mode="auto"), AdapterOff)
    assert isinstance(build_reference(no_lora(load()), load, mode="auto"), FrozenCopy)
    with pytest.raises(UserError, match="adapter_off needs an adapter"):
        build_reference(no_lora(load()), load, mode="adapter_off")


def test_adapter_off_equals_frozen_copy_after_training_too(load):
    policy = lora(load())
    start = pair_logps(load(), BATCH)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    off = build_reference(policy, load, mode="adapter_off").pair_logps(policy, BATCH)
    copy = build_reference(policy, load, mode="frozen_copy").pair_logps(policy, BATCH)
    for reference in (off, copy):
        for ours, theirs in zip(reference, start, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.allclose(pair_logps(policy, BATCH).chosen, start.chosen)


def test_a_frozen_copy_neither_trains_nor_drops_out(load):
    copy = FrozenCopy(load())
    copy.train()
    assert not copy.model.training
    assert not any(p.requires_grad for p in copy.parameters())


def test_an_offloaded_copy_follows_no_device_but_a_dtype_and_visits_the_batchs(load):
    policy, twin = no_lora(load()), FrozenCopy(load())
    reference = build_reference(policy, load, mode="frozen_copy", offload=True)
    assert isinstance(reference, Offloaded) and [*reference.parameters()] == []
    away = nn.ModuleList([reference]).to("meta")  # what a strategy does to the module that holds it
    assert {p.device.type for p in reference.model.parameters()} == {"cpu"}
    for ours, theirs in zip(reference.pair_logps(policy, BATCH), twin.pair_logps(policy, BATCH), strict=True):
        assert torch.equal(ours, theirs)
    home = [p.data_ptr() for p in reference.model.parameters()]
    with pytest.raises(ZeroDivisionError), visiting(reference.model, torch.device("cpu")):
        raise ZeroDivisionError
    assert [p.data_ptr() for p in reference.model.parameters()] == home
    away.bfloat16().train()
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert not reference.model.training


def test_the_adapter_starts_at_no_change_in_float32(load):
    policy = lora(load())
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert all(p.abs().max() == 0 for n, p in trainable.items() if "lora_B" in n)
    assert policy.training


def test_target_modules_that_match_nothing_are_refused(load):
    with pytest.raises(UserError, match=r"lora\.target_modules=\['nothing_like_it'\]: no layer is called nothing"):
        add_lora(load(), r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["nothing_like_it"])
