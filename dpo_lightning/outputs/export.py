"""A trained policy becomes a folder that transformers and peft load as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from dpo_lightning.model.pretrained import restore_noise
from dpo_lightning.model.source import write_weights


def export(policy: Any, tokenizer: Any, run_dir: Path, merge: bool, card: Callable[[Path, bool], str]) -> Path:
    """Write run_dir/adapter, or run_dir/model where there is no adapter or `merge` asks for it; return the folder.

    Safetensors, tokenizer and README.md; `card` gives the text of the last from the folder and whether it holds
    an adapter. The folder appears whole, by one rename, in place of an older one. Merging changes `policy`. Raises
    OSError where the disk refuses it.
    """
    is_adapter = isinstance(policy, PeftModel) and not merge
    folder = run_dir / ("adapter" if is_adapter else "model")
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
    for left in run_dir.glob(f".{folder.name}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        _write_weights(policy, is_adapter, scratch)
        _write_tokenizer(tokenizer, scratch)
        (scratch / "README.md").write_text(card(folder, is_adapter), encoding="utf-8")
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors come out readable by their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_weights(policy: Any, is_adapter: bool, scratch: Path) -> None:
    if is_adapter:
        # "auto" would ask the hub whether the vocabulary has grown; it has not
        write_weights(policy, scratch, save_embedding_layers=False)
    else:
        model = _merged(policy) if isinstance(policy, PeftModel) else policy
        model.config.use_cache = True  # as the base has it
        restore_noise(model.config, getattr(model, "dpo_own_noise", {}))
        write_weights(model, scratch)


def _write_tokenizer(tokenizer: Any, scratch: Path) -> None:
    try:
        tokenizer.save_pretrained(scratch)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # the tokenizers package has no other kind for a full disk


def _merged(policy: PeftModel) -> Any:
    """Return the base model with the adapter in its weights; the head's own, where only it or the embedding has one.

    Merged into a tensor that both use, either's adapter would change the other.
    """
    base: Any = policy.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    inner = [getattr(part, "base_layer", part) for part in (embedding, head)]
    if inner != [embedding, head] and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    return policy.merge_and_unload()
