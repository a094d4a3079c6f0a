"""The operations that a pair needs, against figures computed by hand for known models."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_lightning.model.flops import PairFlops, matmul_peak
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


def test_a_mixture_of_experts_is_not_counted():
    with torch.device("meta"):
        model = model_of("mixtral", {"num_local_experts": 2})
    assert PairFlops.of(model) is None


def test_the_peak_is_a_speed():
    assert 1e9 < matmul_peak(torch.device("cpu"), torch.float32) < 1e14
