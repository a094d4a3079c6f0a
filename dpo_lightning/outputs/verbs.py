"""The verbs that work on finished runs: export, report, compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_lightning.outputs.report import write_report
from dpo_lightning.outputs.results import ROWS, validations
from dpo_lightning.paths import looking
from dpo_lightning.types import UserError

ELSEWHERE = "free space, or copy the run to a folder that may be written"


def run_folder(cfg: Mapping[str, Any]) -> Path:
    """Return run_dir, which must hold a run."""
    if not cfg["run_dir"]:
        raise UserError("run_dir is not set: give run_dir=FOLDER of a run")
    folder = Path(cfg["run_dir"])
    with looking("run_dir", folder):
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"run_dir={folder}: no metrics.jsonl there; give the folder of a run")
    return folder


def report(cfg: Mapping[str, Any]) -> int:
    """Write report.html and its plots anew."""
    folder = run_folder(cfg)
    try:
        page = write_report(folder)
    except OSError as error:
        raise UserError(f"run_dir={folder}: the report cannot be written ({error}); {ELSEWHERE}") from error
    print(page)
    return 0


def compare(cfg: Mapping[str, Any]) -> int:
    """Print the last validations of several runs side by side."""
    names = [name.strip() for name in str(cfg["run_dir"] or "").split(",") if name.strip()]
    folders = [run_folder({"run_dir": name}) for name in names or [""]]
    lasts = [(validations(folder) or [{}])[-1] for folder in folders]
    table = Table(title="Last validation", title_justify="left")
    table.add_column("")
    for folder, last in zip(folders, lasts, strict=True):
        table.add_column(Text(f"{folder.name} (step {last.get('step', '-')})"), justify="right")
    for key, name in ROWS.items():
        table.add_row(name, *(f"{last[key]:.4f}" if key in last else "-" for last in lasts))
    Console().print(table)
    return 0


def export(cfg: Mapping[str, Any]) -> int:
    """Merge the adapter of a finished run into its base, as RUN/model."""
    folder = run_folder(cfg)
    adapter = folder / "adapter"
    if not cfg["export"]["merge"]:
        raise UserError("export.merge=false: there is nothing to do, runs export their adapter; give export.merge=true")
    with looking("run_dir", folder):
        if not (adapter / "adapter_config.json").is_file():
            raise UserError(f"run_dir={folder}: no adapter/ to merge; the run trained all weights, or has not ended")
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from dpo_lightning.model.pretrained import load_model, loaded
    from dpo_lightning.outputs.card import merged_card
    from dpo_lightning.outputs.export import export as write

    try:
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        precision = re.findall(r"^  precision: (\S+)", (folder / "config.yaml").read_text(encoding="utf-8"), re.M)[0]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"run_dir={folder}: adapter_config.json or config.yaml is not whole ({error!r})") from error
    half = precision.startswith("bf16")  # the dtype in which the run had its base, as a merge at the run's end is
    model = load_model(base, torch.bfloat16 if half else torch.float32, "base_model_name_or_path")
    try:
        policy = PeftModel.from_pretrained(model, str(adapter))
        text = (adapter / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the adapter {adapter} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer = loaded(str(adapter), AutoTokenizer.from_pretrained, "the tokenizer")
    try:
        print(write(policy, tokenizer, folder, True, lambda where, _: merged_card(text, where)))
    except OSError as error:
        raise UserError(f"run_dir={folder}: the model cannot be written ({error}); {ELSEWHERE}") from error
    return 0
