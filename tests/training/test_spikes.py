"""A step far above the last ones is left out, also by a run that was resumed; the weights are as if it had not been."""

import pytest

from dpo_lightning.training.spikes import LEAST, Spikes
from tests.ranks import TINY, fault, rows, run_ranks, trace, traced

WORDS = [
    *TINY, "data.max_length=64", "skip_spikes=6", "trainer.max_steps=20", "trainer.max_epochs=2",
    "checkpoint.every_n_steps=17", "checkpoint.keep_last=null", "trainer.limit_val_batches=0",
]  # fmt: skip
SPIKE = fault("at=loss;do=times:100;step=18;rank=0")  # of two ranks, one
STRATEGIES = ("single", "zero2 bf16", "zero1", "zero3_offload")
RESUMED = STRATEGIES[:2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """Run each strategy to its end, and from the middle of the window on, with the same fault."""
    folder = tmp_path_factory.mktemp("spikes")

    def words(run: str, strategy: str) -> list[str]:
        name, _, short = strategy.partition(" ")
        size = ["data.batch_size=2"] if name == "single" else ["data.batch_size=1", "trainer.devices=2"]
        precision = ["trainer.precision=bf16-mixed"] if short else []
        return [*traced(folder / run / strategy, *WORDS, *size, *precision, f"strategy={name}"), *SPIKE]

    whole = [words("whole", each) for each in STRATEGIES]
    resumed = [[*words("resumed", each), f"resume={folder}/whole/{each}/checkpoints/step-00000017"] for each in RESUMED]
    run_ranks([whole[0], resumed[0]], cache, world=1)
    run_ranks([*whole[1:], *resumed[1:]], cache)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_changes_no_weight_and_is_counted(runs, strategy):
    for rank in range(1 if strategy == "single" else 2):
        steps = trace(runs / "whole" / strategy, rank)
        assert steps[19]["weights"] == steps[18]["weights"]
        assert steps[18]["weights"] != steps[17]["weights"]
        assert steps[20]["weights"] != steps[19]["weights"]
    skipped = {row["step"]: row.get("train/skipped_steps") for row in rows(runs / "whole" / strategy)}
    assert skipped[18] is None
    assert skipped[19] == 1


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_resumed_run_leaves_out_the_same_steps(runs, strategy):
    expected = {step: row for step, row in trace(runs / "whole" / strategy).items() if step > 17}
    assert trace(runs / "resumed" / strategy) == expected


def test_nothing_is_a_spike_before_the_window_has_filled_or_where_none_is_wanted():
    spikes = Spikes(6)
    assert not any(spikes.is_spike(1000.0 if step == 9 else 1 + step % 2, 1.0) for step in range(LEAST))
    assert not any(Spikes(None).is_spike(10.0**step, 1.0) for step in range(40))


def test_either_of_loss_and_norm_makes_a_spike():
    for loss, norm in ((50.0, 1.0), (1.0, 50.0)):
        spikes = Spikes(6)
        for step in range(LEAST):
            assert not spikes.is_spike(1 + step % 2, 1 + step % 2)
        assert spikes.is_spike(loss, norm)
