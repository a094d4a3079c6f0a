"""reference=cached gives the live reference's numbers, and computes a pair once under what makes them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dpo_lightning.cluster.exits import WRONG_NUMBERS
from dpo_lightning.cluster.interrupt import Interrupt
from dpo_lightning.data.reference_store import RECORD, ReferenceStore
from dpo_lightning.model import products
from dpo_lightning.model.layout import set_layout
from dpo_lightning.resolve import reference_mode
from dpo_lightning.training import reference_cache
from dpo_lightning.training.reference_cache import ReferenceCache
from dpo_lightning.types import PairLogps
from tests.model.test_layout import model_of
from tests.ranks import fault, run_ranks

WORDS = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.precision=32-true", "resume=never",
    "data.max_length=448", "data.max_pairs=40", "data.batch_size=4", "optim.schedule=constant",
]  # fmt: skip
PAIRS = 40


@pytest.fixture
def cache(tmp_path):
    """A cache of the test's own."""
    return tmp_path / "cache"


@pytest.fixture
def train(cli, metrics, tmp_path, capfd):
    """Train; return the metrics and how many pairs each job computed."""
    folders = iter(range(99))

    def run(*words):
        folder = tmp_path / f"run{next(folders)}"
        assert cli(*WORDS, *words, f"run_dir={folder}") == 0
        return metrics(folder), computed_by(capfd)

    return run


def computed_by(capfd):
    """The pairs that each job says it computed."""
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("reference: ")]
    return [int(line.split()[1]) for line in told]


@pytest.mark.parametrize("lora", [[], ["lora=none", "optim.lr=1e-4"]])
@pytest.mark.parametrize("extra", [[], ["model.gradient_checkpointing=true"], ["data.layout=padded"]])
def test_cached_equals_live(train, lora, extra):
    live, none = train(*lora, *extra, f"reference={'frozen_copy' if lora else 'adapter_off'}")
    fresh, computed = train(*lora, *extra, "reference=cached")
    again, found = train(*lora, *extra, "reference=cached")
    assert (none, computed, found) == ([], [PAIRS], [0])
    assert len(live) == 11 and live[1]["train/loss"] > 0.69 > live[9]["train/loss"]
    for cached in (fresh, again):
        for one, other in zip(cached, live, strict=True):
            for key in (k for k in one if k.startswith(("train/", "val/"))):
                bound = 1e-4 if key == "train/grad_norm" else 1e-5
                assert one[key] == pytest.approx(other[key], abs=2e-5, rel=bound), (one["step"], key)


@pytest.mark.parametrize(
    ("precision", "lora"), [("bf16-mixed", "r16"), ("bf16-true", "r16"), ("bf16-mixed", "none"), ("bf16-true", "none")]
)
def test_cached_equals_live_in_bfloat16(train, precision, lora):
    words = [f"trainer.precision={precision}", f"lora={lora}", "loss.beta=0.01", "optim.lr=1e-4"]
    live, _ = train(*words, f"reference={'adapter_off' if lora == 'r16' else 'frozen_copy'}")
    cached, computed = train(*words, "reference=cached")
    assert computed == [PAIRS]
    for one, other in zip(cached, live, strict=True):
        for key in ("rewards/chosen", "rewards/rejected"):
            values = [row.get(f"train/{key}", row.get(f"val/{key}")) for row in (one, other)]
            assert values[0] == pytest.approx(values[1], abs=0.01 * 0.2), (one["step"], key)  # 0.2 nats of 2000


def test_of_the_held_out_pairs_those_that_are_met_are_computed(train):
    words = ["reference=cached", "data.val_fraction=0.3", "trainer.num_sanity_val_steps=-1"]
    assert train(*words, "trainer.limit_val_batches=2")[1] == [PAIRS - 12 + 2 * 4]
    assert train(*words)[1] == [12 - 2 * 4]


def test_only_what_changes_the_numbers_is_in_the_key(train, monkeypatch):
    assert train("reference=cached")[1] == [PAIRS]
    for words in (["optim.lr=3e-3"], ["loss.beta=0.5"], ["loss=ipo"], ["data.batch_size=5"], ["seed=7"], ["lora.r=4"],
                  ["data.max_pairs=30"], ["data.shuffle=false", "data.val_fraction=0.3"]):  # fmt: skip
        assert train("reference=cached", *words)[1] == [0], words
    assert train("reference=cached", "data.max_pairs=44")[1] == [4]
    bf16 = "trainer.precision=bf16-mixed"
    for words in ([bf16], ["data.layout=padded"], ["lora=none", bf16], ["model.dimensions.intermediate_size=96"]):
        assert train("reference=cached", *words)[1] == [PAIRS], words
    monkeypatch.setattr(products, "EMULATED", not products.EMULATED)
    assert train("reference=cached", bf16)[1] == [PAIRS]
    assert train("reference=cached")[1] == [0]
    shorter = train("reference=cached", "data.max_length=400")[1][0]
    assert 0 < shorter < PAIRS  # the rows that this cuts


autocast = partial(torch.autocast, "cpu", torch.bfloat16)
NUMERICS = {
    "weights": lambda patch, trainer, module: "other",
    "precision": lambda patch, trainer, module: setattr(trainer, "precision", "64-true"),
    "stored": lambda patch, trainer, module: module.policy.bfloat16() and None,
    "layout": lambda patch, trainer, module: setattr(module, "layout", "padded (a reason)"),
    "attention": lambda patch, trainer, module: patch.setattr(reference_cache, "kernel_for", lambda *given: "varlen"),
    "products": lambda patch, trainer, module: patch.setattr(reference_cache, "product_dtype", lambda *given: "other"),
    "autocast": lambda patch, trainer, module: setattr(trainer.precision_plugin, "forward_context", autocast),
    "matmul": lambda patch, trainer, module: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "torch": lambda patch, trainer, module: patch.setattr(torch, "__version__", "0"),
    "transformers": lambda patch, trainer, module: patch.setattr(reference_cache.transformers, "__version__", "0"),
}


@pytest.mark.parametrize("changed", NUMERICS)
def test_each_of_what_makes_the_numbers_is_in_the_key(changed, tmp_path, monkeypatch):
    def name_of(change=lambda *parts: None):
        plugin = SimpleNamespace(forward_context=nullcontext)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer: Any = SimpleNamespace(precision="32-true", strategy=strategy, precision_plugin=plugin)
        module = SimpleNamespace(policy=model_of("llama", {}), layout="shared")
        set_layout(module.policy, "padded")
        digest = change(monkeypatch, trainer, module) or "digest"
        return ReferenceCache(tmp_path, lambda: digest, Interrupt())._store(trainer, module).file.name

    before = name_of()
    assert name_of() == before != name_of(NUMERICS[changed])


def test_the_second_trial_of_a_sweep_computes_nothing(cli, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("-m", *WORDS, "optim.lr=1e-3,2e-3") == 0
    assert computed_by(capfd) == [PAIRS, 0]


def test_a_trial_of_a_wandb_sweep_is_one_of_many(train, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert (train()[1], train()[1]) == ([PAIRS], [0])


def test_a_disk_that_keeps_nothing_costs_no_training(train, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReferenceStore, "append", full)
    assert train("reference=cached")[1] == train("reference=cached")[1] == [PAIRS]


def test_a_store_that_may_not_be_read_costs_no_training(train, monkeypatch, capfd):
    def closed(*args):
        raise PermissionError(13, "Permission denied", "store")

    with monkeypatch.context() as patched:
        patched.setattr(ReferenceStore, "find", closed)
        patched.setattr(ReferenceStore, "append", closed)
        assert train("reference=cached")[1] == [PAIRS]
    assert train("reference=cached")[1] == [PAIRS]


def test_a_run_shorter_than_an_epoch_computes_what_it_meets(train):
    short = ["reference=cached", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    assert train(*short)[1] == [8]
    assert train(*short, "trainer.max_steps=3")[1] == [4]
    assert train(*short, "trainer.max_steps=3", "seed=5")[1][0] > 0


def test_an_epoch_that_is_cut_short_computes_what_it_meets(train):
    words = ["reference=cached", "trainer.limit_val_batches=0", "trainer.max_epochs=1"]
    assert train(*words, "trainer.limit_train_batches=3")[1] == [12]


def test_a_reference_that_gives_no_numbers_ends_the_run_as_such(cli, tmp_path, monkeypatch, capsys):
    nothing = lambda policy, batch: PairLogps(*torch.full((4, len(batch)), torch.nan))  # noqa: E731
    monkeypatch.setattr("dpo_lightning.model.reference.pair_logps", nothing)
    assert cli(*WORDS, "reference=cached", f"run_dir={tmp_path / 'run'}") == WRONG_NUMBERS
    assert "log-probabilities that are not finite" in capsys.readouterr().err


def test_positions_that_depend_on_the_batch_are_not_cached(cli, tmp_path, capsys):
    rope = "{rope_type: dynamic, rope_theta: 10000.0, factor: 2.0, original_max_position_embeddings: 64}"
    words = [*WORDS, f"+model.dimensions.rope_parameters={rope}", "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    assert cli(*words, "reference=cached") == 2
    assert "reference=cached: in sequences as long as these" in capsys.readouterr().err
    assert cli(*words, "trainer.max_epochs=2", "trainer.max_steps=-1", "trainer.limit_train_batches=1") == 0
    assert "mode: adapter_off" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_second_epoch_after_one_that_is_cut_short_meets_other_pairs(train):
    words = ["reference=cached", "trainer.limit_val_batches=0", "trainer.limit_train_batches=2", "trainer.max_epochs=2"]
    assert train(*words, "trainer.max_steps=2")[1] == [8]
    _, (computed,) = train(*words, "trainer.max_steps=3")
    assert computed > 0


def test_a_second_epoch_is_reason_enough():
    def mode(sweep=False, epochs: int | None = 1, steps=-1, full=False, devices=1, limit: float = 1.0):
        cfg = OmegaConf.create({
            "trainer": {"max_steps": steps, "max_epochs": epochs, "accumulate_grad_batches": 2,
                        "limit_train_batches": limit},
            "data": {"batch_size": 4}, "lora": {} if full else {"r": 16},
        })  # fmt: skip
        return reference_mode(cfg, 160, devices, sweep)

    assert (mode(), mode(full=True), mode(sweep=True)) == ("adapter_off", "frozen_copy", "cached")
    assert (mode(epochs=2), mode(epochs=None, steps=20), mode(epochs=-1, steps=21)) == (
        "cached",
        "adapter_off",
        "cached",
    )
    assert mode(epochs=2, steps=20) == "adapter_off" and mode(epochs=2, steps=11, devices=2) == "cached"
    assert mode(epochs=2, steps=6, limit=10) == "cached" and mode(epochs=2, steps=5, limit=0.25) == "adapter_off"


def test_a_cache_that_is_wrong_stops_the_run_at_its_first_batch(cli, cache, tmp_path, capsys):
    words = [*WORDS, "reference=cached"]
    assert cli(*words, f"run_dir={tmp_path / 'one'}") == 0
    (file,) = (cache / "reference").iterdir()
    records = np.fromfile(file, RECORD)
    file.unlink()
    ReferenceStore(file).append(records["key"], records["logps"] * np.array([0.9, 1.1], np.float32))
    assert cli(*words, f"run_dir={tmp_path / 'two'}") == WRONG_NUMBERS
    assert "should be 0.693147" in capsys.readouterr().err


def test_full_fine_tuning_answers_samples_with_the_reference_that_is_not_kept(cli, tmp_path):
    words = [*WORDS, "reference=cached", "lora=none", f"run_dir={tmp_path / 'run'}"]
    assert cli(*words, "samples.count=1", "samples.max_new_tokens=4") == 0
    assert '"reference"' in (tmp_path / "run" / "samples.json").read_text()


def process(cache, *words, **options):
    environment = {**os.environ, "DPO_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpo_lightning", *WORDS, "reference=cached", "trainer.accelerator=cpu", *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_pair_that_rows_repeat_is_computed_once(train, cache, tmp_path):
    rows = [{"prompt": f"Why {n % 3}? ", "chosen": "So.", "rejected": "No."} for n in range(7)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=jsonl", f"data.path={file}", f"data.val_path={file}", "trainer.max_epochs=1", "optim.lr=1e-3"]
    live, _ = train(*words, "reference=adapter_off")
    cached, computed = train(*words, "reference=cached")
    assert computed == [3]
    (store,) = (cache / "reference").iterdir()
    assert len(np.fromfile(store, RECORD)) == 3
    for ours, theirs in zip(cached, live, strict=True):
        for key in {"train/loss", "val/loss"} & {*ours}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5)


def test_two_ranks_compute_each_pair_once_together(train, cache, tmp_path, metrics):
    three = "trainer.max_steps=3"
    one, (pairs,) = train("reference=cached", three)
    (file,) = (cache / "reference").iterdir()
    alone = np.sort(np.fromfile(file, RECORD), order="key")
    file.unlink()
    two = [*WORDS, "reference=cached", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp", three]
    out, _ = run_ranks([[*two, "data.batch_size=2", f"run_dir={tmp_path / 'two'}"]], cache)
    assert f"reference: {pairs} of {pairs} pairs computed" in out
    together = np.sort(np.fromfile(file, RECORD), order="key")
    assert np.array_equal(together["key"], alone["key"])
    assert np.allclose(together["logps"], alone["logps"], atol=2e-4)
    for ours, theirs in zip(metrics(tmp_path / "two"), one, strict=True):
        if "train/loss" in ours:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)


def test_a_signal_to_one_rank_stops_the_pass_of_all(cache, tmp_path):
    two = [*WORDS, "reference=cached", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp"]
    signalled = fault("at=reference.batch;do=SIGTERM;rank=1;nth=2")
    run_ranks([[*two, f"run_dir={tmp_path / 'run'}", *signalled]], cache, code=128 + signal.SIGTERM)
    assert '"end": 143' in (tmp_path / "run" / "starts.jsonl").read_text()


def test_a_pass_that_is_stopped_keeps_what_it_has(cache, tmp_path):
    words = ["data.max_pairs=180", "data.batch_size=1", f"run_dir={tmp_path / 'run'}"]
    run = process(cache, *words)
    deadline = time.monotonic() + 120
    while not list((cache / "reference").glob("*")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 128 + signal.SIGTERM, (out, err)
    (file,) = (cache / "reference").iterdir()
    kept = file.stat().st_size // RECORD.itemsize
    assert 0 < kept < 180
    out, err = (run := process(cache, *words)).communicate(timeout=480)
    assert run.returncode == 0, err
    assert f"reference: {180 - kept} of 180 pairs computed" in out
