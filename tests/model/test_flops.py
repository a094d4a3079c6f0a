"""The operations that a pair needs, against figures computed by hand for known models."""

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_lightning.model import flops
from dpo_lightning.model.flops import MatmulPeak, PairFlops
from dpo_lightning.model.lora import add_lora, no_lora
from tests.model.test_layout import model_of

SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
HH = torch.tensor([[200, 55, 55]])


@pytest.fixture(scope="module", params=["lora", "full"])
def policy(request):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMOLLM2))
    if request.param == "full":
        return no_lora(model)
    return add_lora(model, r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear").to("meta")


def test_weights_are_counted_where_they_are_multiplied(policy):
    counted = PairFlops.of(policy)
    assert counted is not None
    adapter = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)) if hasattr(policy, "peft_config") else 0
    assert counted == PairFlops(trunk=106_168_320, adapter=adapter, head=49_152 * 576, attention=30 * 9 * 64)


@pytest.mark.parametrize(
    ("adapter", "reference", "teraflop"), [(4_884_480, False, 0.163), (4_884_480, True, 0.238), (0, False, 0.2255)]
)
def test_a_pair_of_known_lengths(adapter, reference, teraflop):
    """docs/performance.md's accounting for SmolLM2-135M and a pair of 200, 55 and 55 tokens."""
    needed = PairFlops(106_168_320, adapter, 49_152 * 576, 30 * 9 * 64)
    assert needed.step(HH, reference) == pytest.approx(teraflop * 1e12, rel=0.005)
    assert needed.step(HH.repeat(3, 1), reference) == pytest.approx(3 * needed.step(HH, reference))


@pytest.mark.parametrize(
    ("architecture", "options"), [("mixtral", {"num_local_experts": 2}), ("aria_text", {"moe_num_experts": 2})]
)
def test_a_mixture_of_experts_is_not_counted(architecture, options):
    with torch.device("meta"):
        model = model_of(architecture, options)
    assert PairFlops.of(model) is None


@pytest.mark.parametrize("lora", [False, True])
def test_gpt2s_layers_are_counted_though_they_are_no_linear_ones(lora):
    model = no_lora(model_of("gpt2", {}))
    if lora:
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            model = add_lora(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_fc"])
    adapter = 4 * 4 * (32 + 128) if lora else 0
    assert PairFlops.of(model) == PairFlops(4 * 12 * 32 * 32, adapter, head=97 * 32, attention=4 * 32)


def test_a_model_without_attention_is_not_counted():
    model = model_of("mamba", {})
    del model.config.num_attention_heads  # which Mamba's own configs do not have
    assert PairFlops.of(model) is None


def test_an_adapter_on_the_head_does_not_make_the_head_a_part_of_the_trunk():
    model = model_of("llama", {})
    plain = PairFlops.of(no_lora(model))
    adapted = PairFlops.of(add_lora(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "lm_head"]))
    assert plain is not None and adapted == dataclasses.replace(plain, adapter=4 * 4 * (32 + 32))


def test_the_peak_is_a_speed():
    assert 1e9 < MatmulPeak(torch.device("cpu"), torch.float32).over(1.0) < 1e14


def test_an_interval_is_held_against_the_faster_of_the_products_before_and_after_it(monkeypatch):
    """On a processor whose speed changes, a slow moment at the training's start would make every share too large."""
    speeds = iter([0.04, 0.01, 0.02, 0.03])  # seconds of the fastest product, as each measurement finds it
    budgets = []
    monkeypatch.setattr(flops, "_fastest", lambda matrix, budget: budgets.append(budget) or next(speeds))
    peak = MatmulPeak(torch.device("cpu"), torch.float32)
    seconds = [peak.operations / peak.over(40.0) for _ in range(3)]
    assert seconds == pytest.approx([0.01, 0.01, 0.02])
    assert budgets == [flops.PEAK_SECONDS, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2)]


def test_timing_the_peak_again_waits_until_it_is_a_two_hundredth_of_the_time(monkeypatch):
    timed = []
    monkeypatch.setattr(flops, "_fastest", lambda matrix, budget: timed.append(budget) or 0.01)
    peak = MatmulPeak(torch.device("cpu"), torch.float32)
    for _ in range(10):
        peak.over(1.0)  # four products of 0.01 s are due after 8 s
    assert timed == [flops.PEAK_SECONDS, pytest.approx(0.04)]
