"""The module's step: ln 2 at the start, and the mean over the step's pairs however they are dealt out."""

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from dpo_lightning.cluster.exits import WrongNumbers
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.model import source as source_of_models
from dpo_lightning.model.lora import add_lora, no_lora
from dpo_lightning.model.reference import build_reference
from dpo_lightning.model.source import ModelSource
from dpo_lightning.objective.losses import dpo
from dpo_lightning.training.metric_log import MetricLog
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optim import adamw
from dpo_lightning.types import UserError
from tests.model.test_layout import model_of
from tests.ranks import TINY as TINY_RUN

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = partial(add_lora, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
ADAMW = partial(
    adamw, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, schedule="constant", warmup_fraction=0.0
)


class Record(pl.Callback):
    """Keeps loss, gradient norm and trainable weights of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.steps) < trainer.global_step:
            self.steps.append((module.meters["train"].read("train")["train/loss"], float(module.grad_norm)))
            weights = [p.detach().flatten() for p in module.policy.parameters() if p.requires_grad]
            self.weights = torch.cat(weights).clone()

    def on_fit_end(self, trainer, module):
        self.held = [p for p in module.parameters() if p.grad is not None]
        self.held += [state for optimizer in trainer.optimizers for state in optimizer.state]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path))
    source = ModelSource("tiny", tmp_path, init="random", architecture="llama", dimensions=TINY)

    def fit(batch_size=8, accumulate=1, steps=3, tune=LORA, mode="auto", layout="auto", load_reference=None):
        data = PreferenceData(
            load_tokenizer=source.load_tokenizer, seed=1, max_length=160, batch_size=batch_size,
            path="shipped:explainer", max_pairs=40, val_fraction=0.15,
        )  # fmt: skip
        load = partial(source.load, torch.float32)
        module = DPOModule(
            build_policy=lambda: tune(load()), layout=layout, seed=3, beta=0.1, build_optimizer=ADAMW,
            build_reference=partial(build_reference, load=load_reference or load, mode=mode),
            loss=partial(dpo, beta=0.1, label_smoothing=0.0),
        )  # fmt: skip
        record = Record()
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, logger=False, callbacks=[record],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, data)
        return record

    return fit


@pytest.mark.parametrize("tune", [LORA, no_lora])
def test_the_first_loss_is_ln2_and_training_lowers_it(run, tune):
    steps = run(steps=20, tune=tune).steps  # four epochs
    assert steps[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(loss for loss, _ in steps[-5:]) / 5 < math.log(2) - 0.02


@pytest.mark.parametrize("tune", [LORA, no_lora])
def test_gradients_and_moments_are_let_go_of_where_the_training_ends(run, tune):
    """Lightning would move them to the host: 15 GB for a model of 1.2 billion weights, beside what is being saved."""
    assert run(tune=tune).held == []


@pytest.mark.parametrize("tune", [LORA, no_lora])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 8), (4, 2)])
def test_accumulated_batches_equal_one_batch(run, tune, batch_size, accumulate):
    whole, parts = run(tune=tune), run(batch_size, accumulate, tune=tune)
    for (loss, norm), (other_loss, other_norm) in zip(whole.steps, parts.steps, strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-4, rtol=0)


def test_the_last_step_of_an_epoch_is_a_mean_over_its_own_few_pairs(run):
    # 34 training pairs: the fifth step of 8 has 2, in two micro-batches of 1, or one of 2
    whole, parts = run(8, 1, steps=5), run(1, 8, steps=5)
    assert parts.steps[4][1] == pytest.approx(whole.steps[4][1], rel=1e-3)


def test_shared_prefix_trains_like_padded_pairs(run):
    one, other = run(layout="shared"), run(layout="padded")
    for a, b in zip(one.steps, other.steps, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)


def test_adapter_off_trains_like_a_frozen_copy(run):
    assert run(mode="adapter_off").steps == run(mode="frozen_copy").steps


def test_a_wrong_reference_stops_the_run_before_the_first_update(run, tmp_path):
    other = ModelSource(
        "other", tmp_path, init="random", architecture="llama", dimensions={**TINY, "rms_norm_eps": 0.1}
    )
    with pytest.raises(WrongNumbers, match=r"the first loss is .* and should be 0\.693147"):
        run(mode="frozen_copy", load_reference=partial(other.load, torch.float32))


def test_an_adapter_that_does_not_start_at_zero_stops_the_run(run):
    def tune(model):
        policy = LORA(model)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.3)
        return policy

    with pytest.raises(WrongNumbers, match="the adapter did not start at zero"):
        run(tune=tune)


def test_metrics_are_means_over_pairs_not_over_batches():
    log = MetricLog()
    assert log.latest == {}
    from dpo_lightning.training.meter import PairMeans

    meter = PairMeans()
    meter.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.0, 0.0, 0.0])})
    meter.add({"a": torch.tensor([10.0]), "b": torch.tensor([4.0])})
    assert meter.read("val") == {"val/a": 4.0, "val/b": 1.0}
    assert meter.read("val") == {}


def test_a_dtype_of_sixteen_bits_leaves_the_buffers_as_they_are():
    """transformers keeps rotary frequencies in float32: in bfloat16 they are wrong by up to 0.4 %."""
    module = DPOModule.__new__(DPOModule)
    torch.nn.Module.__init__(module)
    module.policy = torch.nn.Linear(2, 2)
    module.policy.register_buffer("frequencies", torch.rand(5), persistent=False)
    before = module.policy.frequencies.clone()
    torch.nn.Module.to(module, torch.bfloat16)
    assert module.policy.weight.dtype == torch.bfloat16
    assert torch.equal(module.policy.frequencies, before)
    torch.nn.Module.to(module, "meta")
    assert (module.policy.frequencies.device.type, module.policy.frequencies.dtype) == ("meta", torch.float32)


def test_the_adapter_of_an_embedding_that_would_be_sharded_is_refused():
    def sharded():
        policy = add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["embed_tokens"])
        weight: Any = next(iter(policy.parameters()))
        weight.ds_id = 0  # as DeepSpeed marks it
        return policy

    module = DPOModule(
        build_policy=sharded,
        build_reference=lambda _: None,
        loss=partial(dpo, beta=0.1, label_smoothing=0.0),
        beta=0.1,
        build_optimizer=ADAMW,
        seed=0,
    )
    with pytest.raises(UserError, match=r"^lora\.target_modules: .* use strategy=zero2"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT's, of experts
def test_noise_that_training_alone_has_is_seen_behind_a_first_validation(cli, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source_of_models, "without_noise", lambda config: (config, {}))
    experts = ["model.architecture=mixtral", "+model.dimensions.router_jitter_noise=0.5"]
    experts += ["+model.dimensions.num_local_experts=4", "+model.dimensions.num_experts_per_tok=2"]
    assert cli(*TINY_RUN, *experts, "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}") == 3
    told = capsys.readouterr()
    assert "another noise is on" in told.err and "layout      shared" in told.out
