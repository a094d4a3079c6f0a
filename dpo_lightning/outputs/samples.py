"""Prompts answered by reference and policy, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Return the greedy continuations of prompts of token ids, as text."""
    width = max(map(len, prompts))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
    if room < 1:  # the model has no position for an answer
        return [""] * len(prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out: Tensor = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room,
        do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, width:]]


def answer(
    policy: Any, reference: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> list[dict[str, str]]:
    """Return prompt, reference's answer and policy's answer of rows with a `prompt` (ids) and a `question` (text)."""
    prompts = [row["prompt"] for row in rows]
    training = policy.training
    policy.eval()
    model, context = reference.generator(policy)
    with context:
        before = generate(model, tokenizer, prompts, max_new_tokens)
    after = generate(policy, tokenizer, prompts, max_new_tokens)
    policy.train(training)
    return [
        {"prompt": row["question"], "reference": one, "policy": other}
        for row, one, other in zip(rows, before, after, strict=True)
    ]


def save(samples: list[dict[str, str]], run_dir: Path) -> None:
    """Keep them for the report, all or none where the process is killed meanwhile."""
    scratch = run_dir / "samples.json.part"
    scratch.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")
    scratch.replace(run_dir / "samples.json")


def show(samples: list[dict[str, str]]) -> None:
    """Print them side by side."""
    table = Table(title="Prompts, answered", title_justify="left", show_lines=True)
    for name in ("prompt", "reference", "policy"):
        table.add_column(name, overflow="fold", ratio=1)
    for sample in samples:
        table.add_row(*(Text(sample[name]) for name in ("prompt", "reference", "policy")))  # no markup in it
    Console().print(table)
