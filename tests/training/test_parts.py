"""A forward pass that does not fit is made in parts by all ranks: the same pairs, the same loss, the same gradient."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_lightning.checkpoints.folder import STATE
from dpo_lightning.cluster.exits import TooLarge
from dpo_lightning.training.parts import Parts, split
from dpo_lightning.types import Batch, PairLogps
from tests.ranks import TINY, fault, rows, run_ranks, trace, traced

WORDS = [*TINY, "trainer.devices=2", "trainer.max_steps=4", "data.batch_size=4"]
CASES = {"ddp": "lora=r16", "zero2": "lora=r16", "zero1": "lora=none"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("parts")
    whole = [traced(folder / name, *WORDS, f"strategy={name}", lora) for name, lora in CASES.items()]
    short = [
        [*traced(folder / f"{name}-split", *WORDS, f"strategy={name}", lora),
         *fault("at=forward;do=oom;rank=1;step=2;nth=1")]
        for name, lora in CASES.items()
    ]  # fmt: skip
    return folder, run_ranks([*whole, *short], cache)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_make_the_same_step_in_two_parts(runs, name):
    folder, (first, _) = runs
    assert first.count("out of memory at step 3: forward passes are made in 2 parts from here on") == len(CASES)
    whole, parts = trace(folder / name), trace(folder / f"{name}-split")
    assert [row["ids"] for row in parts.values()] == [row["ids"] for row in whole.values()]
    assert [row["random"] for row in parts.values()] == [row["random"] for row in whole.values()]
    for a, b in zip(rows(folder / f"{name}-split"), rows(folder / name), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-5)
        for key in {"train/loss", "train/grad_norm"} & {*b}:
            assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-5), key


def test_a_single_pair_that_does_not_fit_ends_the_run_with_the_remedy(tmp_path, cache):
    words = ["trainer.devices=1", "data.batch_size=4", *fault("at=forward;do=oom;step=1")]
    (output,) = run_ranks([[*traced(tmp_path / "run", *WORDS), *words]], cache, world=1, code=2)
    assert "made in 2 parts" in output
    assert "made in 4 parts" in output
    assert "error: a single pair does not fit into the device's memory" in output


def test_memory_that_ends_in_the_backward_pass_is_told_with_the_remedy(tmp_path, cache):
    words = ["trainer.devices=1", *fault("at=backward.begin;do=oom;step=1")]
    (output,) = run_ranks([[*traced(tmp_path / "run", *WORDS), *words]], cache, world=1, code=2)
    assert "half of data.batch_size with twice trainer.accumulate_grad_batches makes the same steps" in output


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_the_parts_are_the_batch(count):
    lengths = torch.tensor([[3, 1, 2], [2, 2, 2], [4, 1, 1]])
    ids = torch.arange(int(lengths.sum()))
    batch = Batch(ids, lengths, torch.tensor([7, 8, 9]), 3, reference_B2=np.arange(6.0).reshape(3, 2))
    parts = split(batch, count)
    assert len(parts) == min(count, 3)
    assert torch.equal(torch.cat([part.ids_T for part in parts]), ids)
    assert torch.equal(torch.cat([part.lengths_B3 for part in parts]), lengths)
    assert torch.cat([part.rows_B for part in parts]).tolist() == [7, 8, 9]
    assert (
        np.concatenate([np.asarray(part.reference_B2) for part in parts]).tolist()
        == np.arange(6.0).reshape(3, 2).tolist()
    )
    assert all(len(part.ids_T) == int(part.lengths_B3.sum()) for part in parts)


@pytest.mark.parametrize(("others", "pairs"), [(1, 1), (1, 3)])
def test_a_rank_that_has_few_pairs_goes_on_where_another_needs_parts(others, pairs, monkeypatch):
    parts, told = Parts(), []
    said = iter([others, 0])  # of the other rank: out of memory at first, then not
    monkeypatch.setattr(parts._words, "highest", lambda own: max(own, next(said)))
    trainer = SimpleNamespace(strategy=None, global_step=0, lightning_module=SimpleNamespace(print=told.append))
    batch = Batch(torch.arange(4 * pairs), torch.tensor([[2, 1, 1]] * pairs), torch.arange(pairs), pairs)
    score = partial(lambda scale, part: PairLogps(*(scale * torch.ones(4, len(part)))), torch.ones(1))
    policy, _ = parts.score(trainer, batch, score, score)
    assert (len(policy.chosen), parts.count) == (pairs, 2) and "made in 2 parts" in told[0]
    with pytest.raises(TooLarge, match="on another rank"):
        monkeypatch.setattr(parts._words, "highest", lambda own: 2)
        parts.score(trainer, batch, score, score)


def test_a_resumed_run_goes_on_in_parts(runs):
    folder, _ = runs
    for name in CASES:
        for run, count in ((name, 1), (f"{name}-split", 2)):
            (state, *_) = (folder / run / "checkpoints").glob(f"step-00000004/{STATE}")
            assert torch.load(state, weights_only=True)["parts"] == count


def test_the_reference_scores_a_part_once():
    scored = {"policy": 0, "reference": 0}
    weight = torch.ones(1, requires_grad=True)

    def score(who, scale, batch):
        scored[who] += 1
        return PairLogps(*(scale * torch.ones(4, len(batch))))

    parts = Parts()
    parts.count = 2
    batch = Batch(torch.arange(12), torch.tensor([[2, 1, 1]] * 3), torch.arange(3), 3)
    policy, reference = parts._in_parts(batch, partial(score, "policy", weight), partial(score, "reference", 1.0))
    policy.chosen.sum().backward()
    assert (len(policy.chosen), len(reference.chosen)) == (3, 3)
    assert scored == {"policy": 4, "reference": 2}
