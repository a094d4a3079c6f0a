"""No loss or gradient that is not finite reaches a weight or a checkpoint, whichever rank and micro-batch it is of."""

import pytest

from dpo_lightning.checkpoints.folder import published, step_number
from tests.ranks import TINY, fault, run_ranks, trace, traced

WORDS = [*TINY, "checkpoint.every_n_steps=2"]
TWO = ["trainer.devices=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2"]
WRONG_NUMBERS = 3
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("finite")
    words = {
        f"{strategy}-{point}": [
            *traced(folder / f"{strategy}-{point}", *WORDS, *TWO, f"strategy={strategy}"),
            *fault(f"at={point};do={'nan' if point == 'loss' else 'inf'};rank=1;step=3;nth=2"),
        ]
        for strategy in STRATEGIES
        for point in ("loss", "gradient")
    }
    outputs = run_ranks([*words.values()], cache, code=WRONG_NUMBERS)
    told = [[line for line in output.splitlines() if line.startswith("error: ")] for output in outputs]
    assert [len(lines) for lines in told] == [len(words)] * 2
    return folder, dict(zip(words, zip(*told, strict=True), strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_a_number_stops_all_ranks_and_names_the_pairs(runs, strategy):
    folder, told = runs
    for line in told[f"{strategy}-loss"]:
        assert "step 4: a loss or the gradient is not finite" in line
        assert "loss nan, rank 1, micro-batch 2" in line
        assert "rank 0" not in line
        assert "micro-batch 1" not in line
    assert last_step(folder / f"{strategy}-loss") == 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_stops_all_ranks(runs, strategy):
    folder, told = runs
    for line in told[f"{strategy}-gradient"]:
        assert "gradient is not finite; no weight was changed by it" in line
        assert "All losses are finite; the step had these pairs" in line
    assert last_step(folder / f"{strategy}-gradient") == 3


def last_step(run) -> int:
    """Return the last step that was made; the newest checkpoint is of one that was whole."""
    newest, *_ = published(run / "checkpoints")
    assert step_number(newest) == 2
    return max(trace(run))


def test_one_process_stops_before_the_update(tmp_path, cache):
    run = tmp_path / "run"
    words = [*traced(run, *WORDS, "data.batch_size=4"), *fault("at=loss;do=inf;step=2")]
    (output,) = run_ranks([words], cache, world=1, code=WRONG_NUMBERS)
    assert "step 3: a loss or the gradient is not finite" in output
    assert last_step(run) == 2


def test_a_first_loss_that_is_wrong_on_one_rank_stops_all(tmp_path, cache):
    words = [*traced(tmp_path / "run", *WORDS, *TWO, "strategy=ddp", "trainer.limit_val_batches=0")]
    outputs = run_ranks([[*words, *fault("at=loss;do=nan;rank=1;step=0")]], cache, code=WRONG_NUMBERS)
    assert all("rank 1: the first loss is nan and should be 0.693147" in output for output in outputs)
