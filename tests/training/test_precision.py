"""What is stored in 16 bits, and that it changes no bit of the result."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_lightning.model import products
from dpo_lightning.model.layout import probe
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.training.precision import caveat, frozen_dtype, resolve_precision, store_linears


def test_auto_follows_the_machine():
    expected = "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("16-mixed", "cpu") == "16-mixed"
    assert frozen_dtype("bf16-mixed") == torch.bfloat16
    assert frozen_dtype("32-true") == torch.float32


@pytest.mark.parametrize(
    ("precision", "device", "emulated", "warned"),
    [("bf16-mixed", "cpu", True, True), ("bf16-true", "cpu", True, True), ("bf16-mixed", "cpu", False, False),
     ("32-true", "cpu", True, False), ("bf16-mixed", "cuda", True, False)],
)  # fmt: skip
def test_emulated_bfloat16_is_told(precision, device, emulated, warned, monkeypatch):
    monkeypatch.setattr(products, "EMULATED", emulated)
    assert ("trainer.precision=auto" in (caveat(precision, device) or "")) is warned


def test_a_frozen_copy_stored_in_bf16_computes_the_same_bits_under_autocast():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    stored: Any = store_linears(copy.deepcopy(model), torch.bfloat16)
    assert stored.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    assert stored.lm_head.weight.dtype == torch.float32
    batch = probe(97, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for ours, theirs in zip(pair_logps(stored, batch), pair_logps(model, batch), strict=True):
            assert torch.equal(ours, theirs)
