"""The checks of the CPU tests on CUDA devices: `make gpu`. Skipped where there is none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_lightning.model.attention import fused, varlen
from dpo_lightning.model.block_attention import BlockAttention
from dpo_lightning.model.layout import choose_layout, probe
from dpo_lightning.model.segments import ScoreRule
from dpo_lightning.model.shared_prefix import plan
from tests.cluster.test_preflight import ranks
from tests.model.test_layout import SHARED, measured, model_of
from tests.ranks import run_ranks, trace, traced

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TINY = [
    "model=tiny", "logger=none", "callbacks=none", "samples.count=0", "trainer.accelerator=gpu", "data.max_pairs=40",
    "data.max_length=160",
]  # fmt: skip
GEMMA2 = ["model.architecture=gemma2", "+model.dimensions={head_dim: 16, sliding_window: 32}"]
STRATEGIES = ["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
DEVICES = min(2, torch.cuda.device_count())


def devices_of(strategy: str) -> int:
    return 1 if strategy == "single" else DEVICES


def words(strategy: str, lora: str, precision: str) -> list[str]:
    devices = devices_of(strategy)
    return [
        *TINY, f"strategy={strategy}", f"lora={lora}", f"trainer.precision={precision}", f"trainer.devices={devices}",
        f"data.batch_size={8 // devices}",
    ]  # fmt: skip


def on_gpus(run: list[str], cache: Path, strategy: str) -> None:
    run_ranks([run], cache, devices_of(strategy), DS_ACCELERATOR="cuda")


def losses(run: Path) -> list[float]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in logged if "train/loss" in row]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("cpu")
    for lora in ("r16", "none"):
        run = [*TINY, "trainer.accelerator=cpu", f"lora={lora}", "trainer.precision=32-true", "trainer.max_steps=4"]
        kept = [word for word in run if word != "trainer.accelerator=gpu"]
        run_ranks([[*kept, "data.batch_size=8", f"run_dir={folder / lora}"]], cache, world=1)
    return folder


@pytest.mark.parametrize("lora", ["r16", "none"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32_equals_one_cpu_process(on_cpu, tmp_path, cache, strategy, lora):
    run = [*words(strategy, lora, "32-true"), "trainer.max_steps=4", f"run_dir={tmp_path / 'run'}"]
    on_gpus(run, cache, strategy)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(losses(on_cpu / lora), abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_16_bit_training_begins_at_ln2_and_lowers_the_loss(tmp_path, cache, strategy, precision):
    run = [*words(strategy, "r16", precision), "optim.lr=1e-3", "trainer.max_epochs=4", f"run_dir={tmp_path / 'run'}"]
    on_gpus(run, cache, strategy)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(math.log(2), abs=5e-3)
    assert sum(found[-3:]) / 3 < math.log(2) - 0.02


SHARED_PREFIX = [(strategy, ["lora=r16"]) for strategy in STRATEGIES]
OTHERS = [
    ("single", ["lora=r16", "lora.lora_dropout=0.1"]), ("zero2", ["lora=r16", "lora.lora_dropout=0.1"]),
    ("single", ["lora=none"]), ("zero3", ["lora=none"]), ("single", ["lora=r16", "trainer.precision=32-true"]),
    ("single", ["lora=r16", "model.gradient_checkpointing=true"]), ("single", ["lora=r16", *GEMMA2]),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "more"), SHARED_PREFIX + OTHERS)
def test_a_resumed_run_has_the_bits_of_the_one_that_was_not_stopped(tmp_path, cache, strategy, more):
    run = [*words(strategy, "r16", "bf16-mixed"), *more, "data.max_length=800", "trainer.max_epochs=2"]
    run += ["optim.schedule=constant"]  # which does not depend on the number of steps, that the stop changes
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    on_gpus(traced(whole, *run), cache, strategy)
    on_gpus(traced(stopped, *run, "trainer.max_steps=3"), cache, strategy)
    on_gpus(traced(stopped, *run), cache, strategy)
    assert trace(stopped) == trace(whole)


@pytest.mark.parametrize("architecture", SHARED)
def test_the_shared_prefix_agrees_with_padded_pairs(architecture):
    """In float32 to the gradients, in bfloat16 by the probe that chooses the layout."""
    model = model_of(architecture, SHARED[architecture]).to("cuda")
    assert choose_layout(model, "auto") == "shared"
    batch = probe(97, torch.device("cuda"))
    (padded, padded_grads), (shared, shared_grads) = (measured(model, way, batch) for way in ("padded", "shared"))
    torch.testing.assert_close(shared, padded, atol=1e-4, rtol=0)
    largest = max(g.abs().max() for g in padded_grads.values())
    assert all((shared_grads[name] - g).abs().max() <= 1e-4 * largest for name, g in padded_grads.items())
    assert choose_layout(model.bfloat16(), "auto") == "shared"


@pytest.mark.parametrize("strategy", ["single", "zero2"])
def test_an_offloaded_reference_gives_the_same_losses(tmp_path, cache, strategy):
    for offload in ("false", "true"):
        run = [*words(strategy, "none", "bf16-mixed"), "reference=frozen_copy", f"reference.offload={offload}"]
        on_gpus([*run, "trainer.max_steps=3", f"run_dir={tmp_path / offload}"], cache, strategy)
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


def test_the_preflight_of_a_job_finds_the_gpus():
    for code, output in ranks(DEVICES, DEVICES, str(DEVICES), "gpu"):
        assert (code, "error" in output) == (0, False), output
    ((code, output),) = ranks(1, 1, "99", "gpu")
    assert (code, "99 GPUs are needed" in output) == (2, True), output


RULES = [ScoreRule(0.3, None, None), ScoreRule(0.3, 6, None), ScoreRule(0.3, None, 2.0)]
CASES = [(varlen, torch.bfloat16), (varlen, torch.float16), (fused, torch.float32), (None, torch.float32)]


@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 1, 256), (9, 3, 64)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_attention_agrees_with_blocks_on_the_cpu(kernel, dtype, rule, heads):
    """Forward and backward; None is the blocks on the device, which compute capped scores there."""
    if kernel is not None and rule.cap is not None:
        pytest.skip("capped scores go through blocks")
    torch.manual_seed(0)
    row = plan(torch.tensor([[11, 5, 9], [300, 12, 3], [4, 1, 1]]), 3, torch.device("cuda"))
    query, kv, d = heads
    made = [torch.randn(len(row.tokens_T), n, d) for n in (query, kv, kv, query)]

    def run(device: str, dtype: torch.dtype, function: Any) -> list[torch.Tensor]:
        keys = row.segments.keys_K.to(device)
        *qkv, g = (x.to(device, dtype).requires_grad_() for x in made)
        if function is None:
            segments = replace(row.segments, keys_K=keys, masks={})
            out = BlockAttention.apply(*qkv, segments, rule)
        else:
            out = function(qkv[0], qkv[1][keys], qkv[2][keys], row.segments, rule)
        return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, qkv, g))]

    for found, true in zip(run("cuda", dtype, kernel), run("cpu", torch.float64, None), strict=True):
        assert (found - true).norm() < {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 2e-2) * true.norm()
