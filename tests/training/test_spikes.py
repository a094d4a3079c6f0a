"""A step far above the last ones is left out, also by a run that was resumed; the weights are as if it had not been."""

import pytest

from dpo_lightning.training.spikes import LEAST, Spikes
from tests.ranks import TINY, fault, rows, run_ranks, trace, traced

WORDS = [
    *TINY, "data.batch_size=2", "skip_spikes=6", "trainer.max_epochs=2", "checkpoint.every_n_steps=17",
    "checkpoint.keep_last=null", "trainer.limit_val_batches=0",
]  # fmt: skip
SPIKE = fault("at=loss;do=times:100;step=20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("spikes")
    words = traced(folder / "whole", *WORDS)
    run_ranks([[*words, *SPIKE]], cache, world=1)
    # from the middle of the window on, with the same fault
    resumed = [*traced(folder / "resumed", *WORDS), f"resume={folder / 'whole' / 'checkpoints' / 'step-00000017'}"]
    run_ranks([[*resumed, *SPIKE]], cache, world=1)
    return folder


def test_the_step_changes_no_weight_and_is_counted(runs):
    steps = trace(runs / "whole")
    assert steps[21]["weights"] == steps[20]["weights"]
    assert steps[20]["weights"] != steps[19]["weights"]
    assert steps[22]["weights"] != steps[21]["weights"]
    skipped = {row["step"]: row.get("train/skipped_steps") for row in rows(runs / "whole")}
    assert skipped[20] is None
    assert skipped[21] == 1


def test_a_resumed_run_leaves_out_the_same_steps(runs):
    expected = {step: row for step, row in trace(runs / "whole").items() if step > 17}
    assert trace(runs / "resumed") == expected


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
