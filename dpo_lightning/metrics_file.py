"""RUN_DIR/metrics.jsonl as it is read: an object a line, each with its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_lightning.types import UserError

METRICS = "metrics.jsonl"


def logged(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return each line, with its end, and its object; a last line that a crash cut short is left out.

    None stands for what was not finite: null, or NaN and Infinity as they were written once. Raises UserError for
    another line that is no row, and OSError.
    """
    file = run_dir / METRICS
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    return [(line, _row(line, f"{file}, line {n}")) for n, line in enumerate(lines, 1) if line.endswith("\n")]


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        raise UserError(f"{place}: not a line of JSON; remove it") from None
    if not (isinstance(row, dict) and "step" in row):
        raise UserError(f"{place}: not a row with a step; remove it")
    return row
