"""A user's own loss and callbacks, which `trusted_targets` lets in, work as those that are shipped."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from tests.ranks import TINY

RUN = [*TINY, "trainer.max_epochs=3", "data.batch_size=8", "resume=never"]


def rpo(policy, reference, beta, weight):
    """DPO with a term of supervised training, https://arxiv.org/abs/2404.19733."""
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    return -torch.nn.functional.logsigmoid(beta * margin) - weight * policy.chosen / policy.chosen_tokens


def test_a_loss_that_is_more_than_ratios_begins_and_trains(cli, metrics, tmp_path):
    own = ["loss._target_=tests.training.test_own_parts.rpo", "~loss.label_smoothing"]
    own += ["+loss.weight=0.5", "trusted_targets=[tests.training.test_own_parts.rpo]", "optim.lr=1e-3"]
    assert cli(*RUN, *own, f"run_dir={tmp_path / 'run'}") == 0
    losses = [row["train/loss"] for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert losses[0] > 1 and losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(("monitor", "epochs"), [("val/loss", 2), ("val/rewards/margins", 2)])
def test_lightnings_early_stopping_sees_the_validations(monitor, epochs, cli, metrics, tmp_path):
    target = f"{EarlyStopping.__module__}.EarlyStopping"
    stop = [f"+callbacks.stop._target_={target}", f"trusted_targets=[{target}]", "+callbacks.stop.patience=1"]
    stop += [f"+callbacks.stop.monitor={monitor}", "+callbacks.stop.min_delta=100"]  # nothing is that much better
    run = tmp_path / "run"
    assert cli(*RUN, *stop, f"run_dir={run}") == 0
    validations = [row for row in metrics(run) if "val/loss" in row]
    assert len(validations) == 1 + epochs
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["end"] == 0


@pytest.mark.parametrize(("given", "told"), [(["trainer.max_steps=99"], True), (["trainer.max_steps=1"], False)])
def test_more_steps_than_the_epochs_have_are_told(given, told, cli, tmp_path, capsys):
    words = [word for word in RUN if not word.startswith("trainer.max_epochs")]
    assert cli(*words, *given, "trainer.limit_val_batches=0", f"run_dir={tmp_path / 'run'}") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "all of trainer.max_epochs=1: not trainer.max_steps=99, for which give trainer.max_epochs=-1" in out
    ) == told
