"""What cannot be trained as it is named is told in a line, and never filled up."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.model.flops import PairFlops
from dpo_lightning.model.layout import choose_layout
from dpo_lightning.model.lora import add_lora, no_lora
from dpo_lightning.model.pretrained import loaded
from dpo_lightning.model.source import ModelSource
from dpo_lightning.outputs.export import _write_weights
from dpo_lightning.types import UserError
from tests.model.test_layout import SMALL, model_of

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}


@pytest.fixture
def folder(tmp_path) -> Path:
    model_of("llama", {"tie_word_embeddings": False}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder.parent / "cache")


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "its files lack lm_head.weight, which"),
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, r"lack model\.layers\.1\.mlp\.\S+, \S+, "),
        (lambda w: {f"other.{k}": v for k, v in w.items()}, r"and \d+ more, which would be random"),
    ],
)
def test_weights_that_are_in_no_file_are_told_and_not_made_up(change, told, folder):
    assert source(folder).load(torch.float32).training
    rewrite(folder, change)
    with pytest.raises(UserError, match=f"model.name=.*{told}"):
        source(folder).load(torch.float32)


def test_a_tied_head_and_a_head_that_a_language_model_does_not_read_are_no_lack(tmp_path):
    for architecture in ("gemma", "gpt2"):
        model_of(architecture, {"tie_word_embeddings": True}).save_pretrained(tmp_path / architecture)
        source(tmp_path / architecture).load(torch.float32)


def test_weights_of_another_shape_are_told(folder):
    config(folder, intermediate_size=96)
    with pytest.raises(UserError, match=r"model\.name=.* cannot be loaded"):
        source(folder).load(torch.float32)


def test_a_tokenizer_of_an_unknown_kind_is_told(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}, "added_tokens": []}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"model\.name=.* cannot be loaded"):
        source(folder).load_tokenizer()


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "conf.py").write_text("raise SystemExit('run')")
    config(folder, model_type="mine", auto_map={"AutoConfig": "conf.Mine"})
    with pytest.raises(UserError, match="comes with code of its own, which is not run"):
        source(folder).config()


@pytest.mark.parametrize("kind", ["t5", "bart", "llava"])
def test_what_is_no_causal_language_model_is_told_by_its_config(kind, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=rf"^model\.name=.*: {kind} is no causal language model"):
        source(folder).config()
    with pytest.raises(UserError, match=rf"^model\.architecture={kind}: {kind} is no causal language model"):
        ModelSource(kind, folder, init="random", architecture=kind).config()


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(UserError, match=r"^model\.tokenizer=/no/such/folder: .*; there is no such folder$"):
        loaded("/no/such/folder", AutoTokenizer.from_pretrained, "model.tokenizer")


@pytest.mark.parametrize(
    ("architecture", "fields"), [("mixtral", MIXTRAL), ("opt", {"layerdrop": 0.5, "dropout": 0.1, "ffn_dim": 48})]
)
def test_a_training_forward_pass_is_that_of_evaluation(architecture, fields, tmp_path):
    model_of(architecture, fields).save_pretrained(tmp_path / "model")
    model = source(tmp_path / "model").load(torch.float32)
    ids = torch.arange(3, 20)[None]
    training = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, training)
    assert torch.equal(model.eval()(input_ids=ids).logits, training)


def test_routers_that_return_more_than_a_product_have_no_adapter():
    fields = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attn_temperature_tuning": False,
    }
    policy: Any = add_lora(
        model_of("llama4_text", fields), r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )
    adapted = {name.rpartition(".lora_A")[0] for name, _ in policy.named_parameters() if "lora_A" in name}
    assert any("q_proj" in name for name in adapted) and not any("router" in name for name in adapted)
    policy(input_ids=torch.arange(3, 3 + SMALL["num_hidden_layers"])[None])


GEMMA3: Any = {
    "text_config": {**SMALL, "sliding_window": 6, "attention_dropout": 0.1},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}  # fmt: skip


@pytest.fixture
def seeing(tmp_path) -> ModelSource:
    """Gemma 3 as it is from 4B on: a vision tower beside the layers that text passes through."""
    dimensions = {**GEMMA3, "text_config": {**GEMMA3["text_config"], "vocab_size": 300}}
    return ModelSource("seeing", tmp_path, init="random", architecture="gemma3", dimensions=dimensions)


@pytest.mark.parametrize("full", [True, False])
def test_what_text_does_not_pass_through_is_not_trained(full, seeing):
    model: Any = seeing.load(torch.float32)
    lora = partial(add_lora, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    policy: Any = no_lora(model) if full else lora(model)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    policy(input_ids=torch.arange(3, 20)[None]).logits.sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trained
    count, alone = PairFlops.of(policy), PairFlops.of(text_alone(seeing))
    assert count is not None and alone is not None and count.trunk == alone.trunk


def text_alone(seeing: ModelSource) -> Any:
    config: Any = seeing.config().text_config
    return no_lora(AutoModelForCausalLM.from_config(config))


def test_dropout_of_a_part_of_the_config_is_off_and_the_bases_again_in_an_export(seeing, tmp_path):
    model: Any = seeing.load(torch.float32)
    assert model.config.text_config.attention_dropout == 0.0
    assert choose_layout(model, "shared") == "shared"
    _write_weights(no_lora(model), False, tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").text_config.attention_dropout == 0.1


def test_an_adapter_beside_whole_weights_is_neither_taken_nor_passed_over(folder, tmp_path):
    policy: Any = add_lora(
        source(folder).load(torch.float32), r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj"]
    )
    policy.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"^model\.name=.*: holds an adapter: merge it .* move adapter_config\.json away"
    ):
        source(folder).load(torch.float32)
