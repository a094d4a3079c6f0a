"""A merged export is the policy that was trained, whatever layers have adapters."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning.model.lora import add_lora, no_lora
from dpo_lightning.model.source import ModelSource
from dpo_lightning.model.tiny import byte_tokenizer
from dpo_lightning.outputs import verbs
from dpo_lightning.outputs.export import _write_tokenizer, _write_weights, export
from dpo_lightning.types import UserError
from tests.model.test_layout import model_of
from tests.model.test_source import TINY

EMBEDDING = {"llama": "embed_tokens", "gemma2": "embed_tokens", "gpt2": "wte"}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of tied weights and of GPT-2's transposed layers
@pytest.mark.parametrize("adapted", ["head", "embedding", "both", "neither"])
@pytest.mark.parametrize("architecture", EMBEDDING)
def test_of_tied_embeddings_each_gets_its_own_adapter_alone(architecture, adapted, tmp_path):
    names = {"head": ["lm_head"], "embedding": [EMBEDDING[architecture]], "neither": []}
    names["both"] = names["head"] + names["embedding"]
    targets = ["c_attn" if architecture == "gpt2" else "q_proj", *names[adapted]]
    model = model_of(architecture, {"tie_word_embeddings": True})
    policy: Any = add_lora(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.normal_()
        before = policy.get_base_model().get_input_embeddings().weight.clone()
        trained = policy(input_ids=ids).logits
        _write_weights(policy, False, tmp_path)
        exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(exported(input_ids=ids).logits, trained, atol=1e-4 * trained.abs().max(), rtol=0)
    assert exported.config.tie_word_embeddings == (adapted == "neither")
    assert torch.equal(exported.get_input_embeddings().weight, before) == (adapted in ("head", "neither"))


@pytest.mark.parametrize(
    "add", [no_lora, partial(add_lora, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj"])]
)
def test_the_dropout_that_the_training_turned_off_is_the_bases_again(add, tmp_path):
    source = ModelSource(
        "x", tmp_path, init="random", architecture="llama", dimensions={**TINY, "attention_dropout": 0.1}
    )
    model: Any = source.load(torch.float32)
    assert model.config.attention_dropout == 0.0
    _write_weights(add(model), False, tmp_path / "model")
    exported: Any = AutoConfig.from_pretrained(tmp_path / "model")
    assert (exported.attention_dropout, exported.use_cache) == (0.1, True)


@pytest.mark.parametrize(("kind", "raised"), [(Exception, OSError), (OSError, OSError), (KeyError, KeyError)])
def test_a_full_disk_is_one_whatever_the_tokenizers_package_calls_it(kind, raised, tmp_path):
    def full(folder):
        raise kind("No space left on device (os error 28)")

    with pytest.raises(raised, match="No space left"):
        _write_tokenizer(SimpleNamespace(save_pretrained=full), tmp_path)


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, its adapter with a tokenizer of more tokens than the base has, and the base."""
    (tmp_path / "run").mkdir()
    base = tmp_path / "base"
    model_of("llama", {"tie_word_embeddings": False}).save_pretrained(base)
    loaded: Any = ModelSource(str(base), tmp_path).load(torch.float32)
    policy: Any = add_lora(loaded, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj"])
    tokenizer = byte_tokenizer()
    assert len(tokenizer) > loaded.config.vocab_size
    export(policy, tokenizer, tmp_path / "run", False, lambda *_: "A LoRA adapter of it.")
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "config.yaml").write_text("trainer:\n  precision: 32-true\n")
    return tmp_path / "run"


def test_a_merge_leaves_the_bases_vocabulary_as_it_is(run):
    assert verbs.export({"run_dir": str(run), "export": {"merge": True}}) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (run.parent / "base", run / "model"))
    assert {name: weight.shape for name, weight in after.items()} == {n: w.shape for n, w in before.items()}
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_merge_into_a_base_that_lacks_weights_is_refused(run):
    file = run.parent / "base" / "model.safetensors"
    save_file({k: w for k, w in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"base_model_name_or_path=.*: its files lack lm_head\.weight"):
        verbs.export({"run_dir": str(run), "export": {"merge": True}})


def test_a_merge_without_a_whole_tokenizer_is_refused(run):
    (run / "adapter" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer=.*adapter: cannot be loaded"):
        verbs.export({"run_dir": str(run), "export": {"merge": True}})
