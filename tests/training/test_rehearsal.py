"""Before the first step the largest batch ahead goes through the model, and the training is the same to the bit."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.model.lora import add_lora, no_lora
from dpo_lightning.model.reference import build_reference
from dpo_lightning.model.source import ModelSource
from dpo_lightning.objective.losses import dpo
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optim import adamw
from dpo_lightning.training.rehearsal import Rehearsal, _backward
from tests.ranks import TINY, fault, rows, run_ranks, trace, traced

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPOUT = partial(add_lora, r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
ADAMW = partial(adamw, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, schedule="constant",
                warmup_fraction=0.0)  # fmt: skip


class Scored(DPOModule):
    """Keeps which pairs each forward pass had."""

    def forward(self, batch):
        self.seen = [*getattr(self, "seen", []), batch.rows_B.tolist()]
        return super().forward(batch)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path))
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=SMALL)

    def build():
        return PreferenceData(
            load_tokenizer=source.load_tokenizer, seed=1, max_length=160, batch_size=4, path="shipped:explainer",
            max_pairs=40, val_fraction=0.15,
        )  # fmt: skip

    build.load = partial(source.load, torch.float32)
    return build


def fit(data, tune, callbacks):
    """Train three steps; return the module, its trained weights and the random state after them."""
    module = Scored(
        build_policy=lambda: tune(data.load()), seed=3, beta=0.1, build_optimizer=ADAMW,
        build_reference=partial(build_reference, load=data.load, mode="auto"),
        loss=partial(dpo, beta=0.1, label_smoothing=0.0),
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, logger=False, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    torch.manual_seed(7)
    trainer.fit(module, data())
    return module, [p.detach().clone() for p in module.policy.parameters() if p.requires_grad], torch.get_rng_state()


@pytest.mark.parametrize("tune", [DROPOUT, no_lora], ids=["lora with dropout", "full"])
def test_the_largest_batch_goes_first_and_changes_no_bit(data, tune):
    plain, weights, random = fit(data, tune, [])
    module, rehearsed, then = fit(data, tune, [Rehearsal()])
    tokens = data_tokens(data)
    assert module.seen[1:] == plain.seen
    assert module.seen[0] == max(plain.seen, key=lambda pairs: tokens[pairs].sum())
    assert module.seen[0] != plain.seen[0], "the first batch is the largest: this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(rehearsed, weights, strict=True))
    assert torch.equal(then, random)
    assert module.meters["train"].read("train") == plain.meters["train"].read("train")


def test_the_pairs_of_a_batch_that_fails_are_known(data, monkeypatch):
    plain, *_ = fit(data, DROPOUT, [])
    largest = max(plain.seen, key=lambda pairs: data_tokens(data)[pairs].sum())
    modules = []

    def fail(self, batch):
        modules.append(self)
        raise RuntimeError("a row that no model can take")

    monkeypatch.setattr(Scored, "forward", fail)
    with pytest.raises(RuntimeError, match="no model can take"):
        fit(data, DROPOUT, [Rehearsal()])
    assert modules[0].guard.rows == [largest]


def test_of_the_gradients_none_is_held(monkeypatch):
    weights = [torch.nn.Parameter(torch.full((3, 3), float(n + 1))) for n in range(4)]
    made, held = [], []
    for p in weights:
        p.register_hook(lambda gradient: made.append(gradient.untyped_storage().nbytes()))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: held.extend(grad(*args, **more)))
    _backward((torch.ones(1, 3) @ weights[0] @ weights[1] @ weights[2] @ weights[3]).sum(), weights)
    assert made == [36] * 4, "nine float32 each: the whole backward pass is gone through"
    assert [gradient.untyped_storage().nbytes() for gradient in held] == [4] * 4
    assert all(p.grad is None and len(p._backward_hooks or ()) == 1 for p in weights)


def data_tokens(data):
    prepared = data()
    prepared.prepare_data()
    return prepared.tokens_N


@pytest.mark.parametrize(("position", "limit", "max_steps", "step", "ahead"), [
    ((0, 0), 1.0, -1, 0, slice(0, None)),
    ((1, 0), 1.0, -1, 5, slice(0, None)),
    ((0, 16), 1.0, -1, 2, slice(4, None)),
    ((1, 16), 3, -1, 6, slice(0, 0)),
    ((1, 8), 4, -1, 6, slice(2, 4)),
    ((0, 8), 1.0, 2, 1, slice(2, 4)),
])  # fmt: skip
def test_only_what_this_epoch_still_meets_is_rehearsed(data, position, limit, max_steps, step, ahead):
    prepared = data()
    prepared.prepare_data()
    prepared.trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_rank=0, world_size=1, limit_train_batches=limit, max_steps=max_steps,
        global_step=step,
    )  # fmt: skip
    order = prepared.order()
    order.set_epoch(position[0])
    sizes = [int(prepared.tokens_N[list(micro.rows)].sum()) for micro in order][ahead]
    prepared.position = position
    batch = prepared.largest_ahead()
    assert (batch is None) == (not sizes)
    assert batch is None or len(batch.ids_T) == max(sizes)


CASES = {"ddp": "lora=r16", "zero1": "lora=none", "zero2": "lora=r16"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("rehearsal")
    words = [*TINY, "trainer.devices=2", "trainer.max_steps=2", "data.batch_size=4", "trainer.limit_val_batches=0"]
    runs = []
    for name, lora in CASES.items():
        runs.append(traced(folder / name, *words, f"strategy={name}", lora))
        short = fault("at=forward;do=oom;rank=1;step=0;nth=1")
        runs.append([*traced(folder / f"{name}-short", *words, f"strategy={name}", lora), *short])
    return folder, run_ranks(runs, cache)


@pytest.mark.parametrize("name", CASES)
def test_ranks_find_out_together_that_a_batch_does_not_fit(ranks, name):
    folder, (first, _) = ranks
    assert first.count("out of memory at step 1: forward passes are made in 2 parts from here on") == len(CASES)
    whole, parts = trace(folder / name), trace(folder / f"{name}-short")
    assert [row["ids"] for row in parts.values()] == [row["ids"] for row in whole.values()]
    assert [row["random"] for row in parts.values()] == [row["random"] for row in whole.values()]
    for a, b in zip(rows(folder / f"{name}-short"), rows(folder / name), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-5)
