"""What a run reached, read from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_lightning.metrics_file import METRICS, logged
from dpo_lightning.types import UserError

ROWS = {
    "val/loss": "loss",
    "val/rewards/accuracies": "reward accuracy",
    "val/rewards/margins": "reward margin",
    "val/rewards/chosen": "reward of chosen",
    "val/rewards/rejected": "reward of rejected",
}


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl's objects, each without what was not finite.

    A last line cut short by a crash is left out, a UserError names another.
    """
    return [{key: value for key, value in row.items() if value is not None} for row in _rows(run_dir)]


def _rows(run_dir: Path) -> list[dict[str, float | None]]:
    if not (run_dir / METRICS).is_file():
        raise UserError(f"run_dir={run_dir}: no {METRICS} there; give the folder of a run")
    return [row for _, row in logged(run_dir)]


def validations(run_dir: Path) -> list[dict[str, float]]:
    """Return the logged validations, oldest first."""
    return [row for row in read_metrics(run_dir) if is_validation(row)]


def is_validation(row: Mapping[str, float | None]) -> bool:
    """Return whether a row is of a validation; its loss alone may have been infinite."""
    return any(key in row for key in ROWS)


def figures(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, list[str]]]:
    """Yield each metric that one of the validations has, by its name, with its values as text, - where one lacks it."""
    for key, name in ROWS.items():
        if any(key in row for row in rows):
            yield name, [f"{row[key]:.4f}" if key in row else "-" for row in rows]


def last(run_dir: Path, key: str) -> float | None:
    """Return a metric of the last validation that has it, or None where none has, or where it was not finite."""
    return next((row[key] for row in reversed(_rows(run_dir)) if is_validation(row) and key in row), None)


def show_gain(run_dir: Path) -> None:
    """Print the first and the last validation."""
    rows = validations(run_dir)
    if not rows:
        return
    table = Table(title="Validation", title_justify="left")
    shown = {f"before (step {rows[0]['step']})": rows[0]} if len(rows) > 1 else {}
    shown[f"after (step {rows[-1]['step']})"] = rows[-1]
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    for name, values in figures([*shown.values()]):
        table.add_row(name, *values)
    Console().print(table)
