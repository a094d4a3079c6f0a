"""A run goes on with the base's weights that it has begun with, though its checkpoints hold none of them."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.model.tiny import byte_tokenizer
from tests.ranks import TINY, run_ranks, traced


@pytest.fixture
def base(tmp_path):
    """Return a model's folder."""
    write(tmp_path / "base", 0)
    return tmp_path / "base"


def write(folder, seed):
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(base):
    return [*(word for word in TINY if word != "model=tiny"), "model=hf", f"model.name={base}", "data.batch_size=4"]


def test_replaced_weights_are_told_and_may_be_taken_on_purpose(base, tmp_path, cli, capsys):
    line = [*words(base), f"run_dir={tmp_path / 'run'}"]
    assert cli(*line, "trainer.max_steps=1") == 0
    shutil.rmtree(base)
    write(base, 1)
    assert cli(*line, "trainer.max_steps=2") == 2
    told = capsys.readouterr().err
    assert "model.name: its weights are not those that " in told and "resume_allow=[model.name]" in told
    assert cli(*line, "trainer.max_steps=2", "resume_allow=[model.name]") == 0
    assert cli(*line, "trainer.max_steps=3") == 0, "its checkpoint is of the new ones"


def test_a_model_that_was_moved_is_the_same(base, tmp_path, cli):
    run = tmp_path / "run"
    assert cli(*words(base), f"run_dir={run}", "trainer.max_steps=1") == 0
    base.rename(tmp_path / "moved")
    assert cli(*words(tmp_path / "moved"), f"run_dir={run}", "trainer.max_steps=2", "resume_allow=[model.name]") == 0
    noted = [json.loads(file.read_text())["base"] for file in run.glob("checkpoints/step-*/manifest.json")]
    assert len(noted) == 2 and noted[0] == noted[1]


def test_what_lies_beside_the_weights_is_not_the_base(base, tmp_path, cli):
    line = [*words(base), f"run_dir={tmp_path / 'run'}"]
    assert cli(*line, "trainer.max_steps=1") == 0
    (base / "pytorch_model.bin").write_bytes(b"the same weights for other programs")
    (base / "training_args.bin").touch()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99"}))
    assert cli(*line, "trainer.max_steps=2") == 0


def test_a_checkpoint_that_does_not_say_is_gone_on_from(base, tmp_path, cli):
    line = [*words(base), f"run_dir={tmp_path / 'run'}"]
    assert cli(*line, "trainer.max_steps=1") == 0
    file = tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert len(manifest.pop("base")) == 64
    file.write_text(json.dumps(manifest))
    assert cli(*line, "trainer.max_steps=2") == 0


def test_every_rank_ends(base, tmp_path, cache):
    line = [*traced(tmp_path / "run", *words(base)), "trainer.devices=2"]
    run_ranks([[*line, "trainer.max_steps=1"]], cache)
    shutil.rmtree(base)
    write(base, 1)
    for output in run_ranks([[*line, "trainer.max_steps=2"]], cache, code=2):
        assert "its weights are not those that" in output
