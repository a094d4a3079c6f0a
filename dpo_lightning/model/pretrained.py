"""What `from_pretrained` gives, or in one line why it gives nothing that can be trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from dpo_lightning.paths import is_path, looking
from dpo_lightning.types import UserError

# What is raised for files that are not there, not whole, of another model, or that want another package. The tokenizers
# package raises a bare Exception.
UNLOADABLE = (OSError, ValueError, RuntimeError, ImportError, LookupError, SafetensorError)
TOLD = 3  # missing weights that are named
PHI_MOE = ("phimoe", "router_jitter_noise")  # is a threshold of its routing, too: it counts outside training


def load_model(name: str, dtype: torch.dtype, key: str = "model.name", **options: Any) -> Any:
    """Return the causal language model of a folder or on the hub, in `dtype`; `key` is what names it.

    Raises UserError where it cannot be loaded, and where one of its weights is in none of its files: transformers
    fills those with random numbers, other ones each time.
    """
    load = AutoModelForCausalLM.from_pretrained
    model, found = loaded(name, load, key, dtype=dtype, output_loading_info=True, **options)
    if getattr(model, "peft_config", None):  # transformers has put it on
        raise UserError(
            f"{key}={name}: holds an adapter: merge it into its base first, or move adapter_config.json away where the "
            "weights are whole without it"
        )
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - TOLD} more" if len(missing) > TOLD else ""
        raise UserError(
            f"{key}={name}: its files lack {', '.join(missing[:TOLD])}{more}, which would be random numbers; the "
            "files are not whole, or those of another model than config.json tells of"
        )
    return model


def loaded(name: str, load: Callable[..., Any], key: str = "model.name", **options: Any) -> Any:
    """Load what the key names, or say in a line what stands in the way. No code that comes with a model is run."""
    try:
        return load(name, trust_remote_code=False, **options)
    except Exception as error:
        if not isinstance(error, UNLOADABLE) and type(error) is not Exception:
            raise
        why = str(error).strip().partition("\n")[0]  # may be empty
        with looking(key, name):
            remedy = _remedy(name, str(error), key)
        raise UserError(f"{key}={name}: cannot be loaded ({why}); {remedy}") from error


def _remedy(name: str, text: str, key: str) -> str:
    there = Path(name).exists()
    given = "model=hf model.name=FOLDER" if key == "model.name" else f"{key}=FOLDER"
    remedies = [
        (is_path(name) and not there, "there is no such folder"),
        (hub.HF_HUB_OFFLINE and not there,
         f"it is not in the local cache: where there is a network, `hf download {shlex.quote(name)}`"),
        ((Path(name) / "adapter_config.json").is_file(),
         "it is an adapter: merge it first, `python -m dpo_lightning export run_dir=RUN export.merge=true` where a run "
         "has made it, else PEFT's merge_and_unload()"),
        ("trust_remote_code" in text,
         "it comes with code of its own, which is not run; give a model that transformers knows"),
        (key == "model.name" and "backend tokenizer" in text, "there is no tokenizer; give model.tokenizer="),
        (any(sign in text for sign in ("gated", "401", "403")),
         "accept its licence on the hub and log in with `hf auth login`, or set HF_TOKEN"),
        (True, f"check the name and the network, or download it elsewhere and give {given}"),
    ]  # fmt: skip
    return next(remedy for helps, remedy in remedies if helps)


def without_noise(config: Any) -> tuple[Any, dict[str, dict[str, float]]]:
    """Return the config with its noise set to 0, and what that was, by the part of the config: "" for itself.

    Two forward passes in training must agree, as DPO compares them.
    """
    own: dict[str, dict[str, float]] = {}
    for name in ("", *config.sub_configs):
        part = getattr(config, name) if name else config
        if part is not None and (found := _noise(part)):
            own[name] = found
            part.update(dict.fromkeys(found, 0.0))
    return config, own


def restore_noise(config: Any, own: dict[str, dict[str, float]]) -> None:
    """Undo `without_noise`."""
    for name, values in own.items():
        (getattr(config, name) if name else config).update(values)


def _noise(config: Any) -> dict[str, float]:
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("drop" in key or "jitter" in key) and isinstance(value, float) and value
        and (config.model_type, key) != PHI_MOE
    }  # fmt: skip
