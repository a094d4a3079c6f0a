"""How the training is spread over devices."""

from __future__ import annotations

from typing import Any


def build_strategy(*, name: str) -> Any:
    """Return Lightning's strategy: auto is none on one device and DDP on several."""
    if name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"
