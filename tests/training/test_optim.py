"""AdamW's groups and the schedules."""

import pytest
import torch
from torch import nn

from dpo_lightning.training.optim import adamw, lr_factor, resolve_lr


def test_only_matrices_decay_and_only_what_trains_is_optimised():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer, _ = adamw(
        model, 10, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5, schedule="cosine", warmup_fraction=0.0
    )
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and [p.shape for p in decayed["params"]] == [torch.Size([2, 4])]
    assert plain["weight_decay"] == 0.0 and [p.shape for p in plain["params"]] == [(4,), (4,), (2,)]
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-6


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules(schedule, expected):
    factor = lr_factor(schedule, 2, 6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected)
    assert factor(99) == (1.0 if schedule == "constant" else 0.0)


def test_auto_learning_rate():
    assert (resolve_lr("auto", full=False), resolve_lr("auto", full=True), resolve_lr(3e-5, True)) == (1e-4, 1e-6, 3e-5)
