"""report.html and its plots, from what lies in a run folder."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

from dpo_lightning.outputs.results import figures, is_validation, read_metrics

PLOTS = {
    "loss": ("train/loss", "val/loss"),
    "rewards": (
        "train/rewards/chosen",
        "train/rewards/rejected",
        "val/rewards/chosen",
        "val/rewards/rejected",
    ),
    "margins": ("train/rewards/margins", "val/rewards/margins"),
    "accuracies": ("train/rewards/accuracies", "val/rewards/accuracies"),
    "logps": ("train/logps/chosen", "train/logps/rejected"),
    "grad_norm": ("train/grad_norm",),
    "pairs_per_second": ("perf/pairs_per_second",),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #ccc; padding: .3rem .6rem;
text-align: left; vertical-align: top; } .plots { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); } img { width: 100%; } pre { overflow: auto; }
"""


def write_report(run_dir: Path) -> Path:
    """Write plots/*.png and report.html into `run_dir`; return the latter."""
    rows = read_metrics(run_dir)
    plots = [plot(rows, name, keys, run_dir / "plots") for name, keys in PLOTS.items()]
    images = [f'<img src="plots/{p.name}" alt="{p.stem}">' for p in plots if p is not None]
    config = run_dir / "config.yaml"
    parts = [
        f"<h1>{html.escape(run_dir.name)}</h1>",
        _table(_gain(rows)),
        f'<div class="plots">{"".join(images)}</div>',
        _samples(run_dir / "samples.json"),
        f"<h2>Configuration</h2><pre>{html.escape(config.read_text(encoding='utf-8'))}</pre>"
        if config.is_file()
        else "",
    ]
    page = run_dir / "report.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run_dir.name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def plot(rows: list[dict[str, float]], name: str, keys: tuple[str, ...], folder: Path) -> Path | None:
    """Draw the curves of `keys` over steps into folder/name.png; None if none of them was logged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(title=name, xlabel="step")
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if key.startswith("val") else None)
    if not axes.lines:
        return None
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)
    return folder / f"{name}.png"


def _gain(rows: list[dict[str, float]]) -> list[list[Any]]:
    vals = [row for row in rows if is_validation(row)]
    if not vals:
        return []
    head = ["validation", *(f"step {row['step']}" for row in vals)]
    return [head, *([name, *values] for name, values in figures(vals))]


def _samples(file: Path) -> str:
    if not file.is_file():
        return ""
    head = ["prompt", "reference", "policy"]
    try:
        answers = [[sample[name] for name in head] for sample in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, LookupError) as error:
        print(f"warning: {file} is not whole ({error}): the report has no answers", file=sys.stderr)
        return ""
    return "<h2>Answers</h2>" + _table([head, *answers])


def _table(rows: list[list[Any]]) -> str:
    if not rows:
        return ""

    def line(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"
