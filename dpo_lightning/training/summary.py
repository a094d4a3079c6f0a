"""What runs, in one table, before it runs: every `auto` as what it became."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_lightning.training.precision import caveat


class Summary(pl.Callback):
    """Prints `facts` and what is known once the model is built: parameters, reference, devices, steps."""

    def __init__(self, facts: Mapping[str, str]):
        self.facts = facts

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print the table on the first rank; all of them choose the layout, as a probe of it may be a joint effort."""
        pl_module.settle_layout()
        if trainer.is_global_zero:
            self._print(trainer, pl_module)

    def _print(self, trainer: pl.Trainer, pl_module: Any) -> None:
        parameters = list(pl_module.policy.parameters())
        sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in parameters]  # ZeRO-3 leaves 0 here
        trainable = sum(size for trains, size in sizes if trains)
        everything = sum(size for _, size in sizes)
        kind = trainer.strategy.root_device.type
        precision = [str(trainer.precision), _dtypes(parameters), caveat(str(trainer.precision), kind)]
        facts = {
            **self.facts,
            "parameters": f"{everything:,}, {trainable:,} trainable ({trainable / everything:.1%})",
            "reference": pl_module.reference.name,
            "layout": pl_module.layout,
            "devices": f"{trainer.world_size} x {kind}, on {trainer.num_nodes} nodes"
            if trainer.num_nodes > 1
            else f"{trainer.world_size} x {kind}",
            "precision": "; ".join(filter(None, precision)),
            "steps": _steps(int(trainer.estimated_stepping_batches), trainer),
        }
        print_facts("DPO", facts)


def _steps(steps: int, trainer: pl.Trainer) -> str:
    if trainer.max_steps <= steps:
        return f"{steps}"
    return (f"{steps}, all of trainer.max_epochs={trainer.max_epochs}: not trainer.max_steps={trainer.max_steps}, for "
            "which give trainer.max_epochs=-1")  # fmt: skip


def _dtypes(parameters: list[Any]) -> str:
    def names(trains: bool) -> str:
        return "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.requires_grad == trains}))

    frozen = names(False)
    return f"trainable weights {names(True)}" + (f", frozen {frozen}" if frozen else "")


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print names and values as a table."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    Console().print(table)
