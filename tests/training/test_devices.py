"""What `auto` becomes by the memory that weights and states take, and what is refused before anything is loaded."""

from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from dpo_lightning.resolve import check_limits
from dpo_lightning.training.devices import choose_strategy, resolve_deterministic, state_bytes
from dpo_lightning.types import UserError

B = 10**9


@pytest.mark.parametrize(
    ("strategy", "precision", "trainable", "copies", "bytes_a_weight"),
    [
        ("single", "32-true", 0, 1, 4), ("single", "bf16-mixed", 0, 1, 2), ("ddp", "32-true", B, 1, 4 + 12),
        ("single", "bf16-mixed", B, 1, 4 + 12), ("ddp", "bf16-mixed", B, 2, 4 + 2 + 12),
        ("single", "bf16-true", B, 1, 2 + 6), ("single", "bf16-true", B, 2, 4 + 6), 
        ("zero1", "32-true", B, 1, 4 + 4 + 2), ("zero1", "bf16-mixed", B, 1, 2 + 2 + 2),
        ("zero2", "bf16-mixed", B, 1, 2 + 3), ("zero2", "bf16-true", B, 2, 4 + 3), ("zero3", "32-true", B, 1, 1 + 3),
        ("zero3_offload", "bf16-true", B, 2, 1 + 3),
    ],
)  # fmt: skip
def test_bytes_of_a_billion_weights_on_one_of_four_devices(strategy, precision, trainable, copies, bytes_a_weight):
    assert state_bytes(strategy, precision, B, trainable, copies, devices=4) == bytes_a_weight * B


def needed(strategy):
    return {"single": 16, "zero2": 8, "zero3": 4, "zero3_offload": 4}[strategy] * B


@pytest.mark.parametrize(
    ("name", "devices", "have", "chosen"),
    [
        ("auto", 1, 24, "single"), ("auto", 4, 12, "zero2"), ("auto", 4, 11, "zero3"), ("auto", 4, 5, "zero3"),
        ("auto", 4, 0, "zero2"), ("zero2", 4, 9, "zero2"), ("zero3_offload", 4, 1, "zero3_offload"),
    ],
)  # fmt: skip
def test_auto_becomes_what_fits(name, devices, have, chosen):
    assert choose_strategy(name, devices, have * B, needed)[0] == chosen


@pytest.mark.parametrize(
    ("name", "devices", "have"), [("auto", 1, 15), ("single", 1, 15), ("zero2", 4, 7), ("auto", 4, 3)]
)
def test_what_cannot_fit_is_refused(name, devices, have):
    with pytest.raises(
        UserError, match=rf"take at least \d+\.0 GB a device, which has {have}\.0 GB; use strategy=zero3"
    ):
        choose_strategy(name, devices, have * B, needed)


@pytest.mark.parametrize("verb", [[], ["check"]])
def test_it_is_refused_before_a_weight_is_made(verb, cli, tmp_path, capsys):
    words = ["model=tiny", "model.dimensions.hidden_size=1048576", "trainer.accelerator=cpu", "logger=none"]
    assert cli(*verb, *words, f"run_dir={tmp_path / 'run'}") == 2
    assert "error: strategy=single: weights and states" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "on_gpus", "on_cpus"), [("auto", "warn", False), (False, False, False), (True, True, True)]
)
def test_auto_asks_gpus_alone_to_repeat_their_bits(given, on_gpus, on_cpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_deterministic(given, "auto") == resolve_deterministic(given, "gpu") == on_gpus
    assert resolve_deterministic(given, "cpu") == on_cpus
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_deterministic(given, "auto") == on_cpus


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"limit_train_batches": 0.04}, r"trainer\.limit_train_batches=0\.04: less than one of 10 batches; give more$"),
        ({"limit_val_batches": 0.2}, r"trainer\.limit_val_batches=0\.2: less than one of 2 batches; give more, or 0$"),
        ({"limit_train_batches": 4, "val_check_interval": 5}, r"trainer\.val_check_interval=5: an epoch has 4 batches"),
        ({"limit_val_batches": 0, "val_check_interval": 10}, None),
        ({"limit_train_batches": 0.1, "limit_val_batches": 0.5}, None),
    ],
)
def test_limits_that_lightning_would_refuse_after_the_model_is_loaded(trainer, told):
    plain = {
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0,
        "val_check_interval": 1.0,
    }
    cfg = OmegaConf.create({"trainer": {**plain, **trainer}, "data": {"batch_size": 4}})
    with pytest.raises(UserError, match=told) if told else nullcontext():
        check_limits(cfg, 80, 16, 2)
