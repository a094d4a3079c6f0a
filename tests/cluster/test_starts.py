"""Each start of a run is on record; one that never comes further is given up, with the reason."""

import json

import pytest

from dpo_lightning.checkpoints.starts import STARTS, announce, check_progress, note, read
from dpo_lightning.cluster.exits import NoProgress
from tests.ranks import TINY, fault, run_ranks, traced

WORDS = [*TINY, "data.batch_size=4", "checkpoint.every_n_steps=2"]
NO_PROGRESS = 6


def test_a_row_that_always_fails_is_tried_no_more_than_so_often(tmp_path, cache):
    run = tmp_path / "run"
    poison = [*traced(run, *WORDS, "cluster.max_restarts=2"), *fault("at=step.begin;do=raise;step=5")]
    (output,) = run_ranks([poison] * 5, cache, world=1, code=[1, 1, 1, 1, NO_PROGRESS])
    rows = read(run)
    # the first comes from the beginning to the checkpoint of step 4; three more begin there
    assert [row["start"] for row in rows if "start" in row] == [0, 4, 4, 4]
    failures = [row for row in rows if "failed" in row]
    assert len(failures) == 4
    assert len(failures[-1]["pairs"]) == 4
    assert "started 3 times from step 4 and never came to a new checkpoint" in output
    assert f"training pairs {', '.join(map(str, failures[-1]['pairs']))}" in output
    run_ranks([traced(run, *WORDS, "cluster.max_restarts=null")], cache, world=1)  # without the fault
    assert "end" in read(run)[-1]


def test_a_rollback_with_other_settings_is_on_record(tmp_path, cache):
    run = tmp_path / "run"
    words = traced(run, *WORDS, "checkpoint.keep_last=null")
    back = f"resume={run / 'checkpoints' / 'step-00000004'}"
    run_ranks([words, [*words, back, "optim.lr=1e-5", "resume_allow=[optim.lr]"]], cache, world=1)
    rows = read(run)
    starts = [row for row in rows if "start" in row]
    assert [row["start"] for row in starts] == [0, 4]
    assert starts[1]["changed"]["optim.lr"] == ["0.0001", "1e-05"] or "optim.lr" in starts[1]["changed"]
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"undone-step-00000006"}


def test_a_line_that_goes_back_goes_on_when_it_is_started_again_as_it_was(tmp_path, cache):
    """As a requeued job is. By then retention has deleted the checkpoint that it names."""
    run = tmp_path / "run"
    words = traced(run, *WORDS, "checkpoint.keep_last=null")
    back = [*traced(run, *WORDS, "checkpoint.keep_last=1"), f"resume={run / 'checkpoints' / 'step-00000004'}"]
    failed = fault("at=step.end;do=raise;step=7")
    run_ranks([words, [*back, *failed], [*back, *failed], back], cache, world=1, code=[0, 1, 1, 0])
    assert [row["start"] for row in read(run) if "start" in row] == [0, 4, 6, 6]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000009"]
    (output,) = run_ranks([[*back, "seed=7"]], cache, world=1, code=2)  # another line: it would go back once more
    assert "step-00000004: no such checkpoint; give an existing one" in output


def test_a_line_that_was_cut_short_before_it_had_gone_back_goes_back(tmp_path, cli, monkeypatch):
    line = [*WORDS, f"run_dir={tmp_path}", "checkpoint.keep_last=null"]
    assert cli(*line) == 0
    back = [*line, f"resume={tmp_path / 'checkpoints' / 'step-00000004'}"]

    def refused(*args):
        raise OSError("the later ones cannot be renamed")

    with monkeypatch.context() as patch:
        patch.setattr("dpo_lightning.train.undo_later", refused)
        assert cli(*back) == 2
    assert cli(*back) == 0
    assert [row["start"] for row in read(tmp_path) if "start" in row] == [0, 4]
    assert (tmp_path / "checkpoints" / "undone-step-00000006").is_dir()


def rows_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("rows", "stops"),
    [
        ([{"start": 8}] * 4, True),
        ([{"start": 8}] * 3, False),
        ([{"start": 8}] * 3 + [{"end": 143}] + [{"start": 8}], False),
        ([{"start": 8}] * 3 + [{"end": 143}] + [{"start": 8}] * 4, True),
        ([{"start": 0}] * 4 + [{"start": 8}], False),
        ([{"start": 8}] * 3 + [{"start": 4}] + [{"start": 8}], False),
        ([], False),
        ([{"begun": 8}, {"start": 8}] * 3, False),
        ([{"begun": 8}, {"start": 8}] * 3 + [{"begun": 8}], True),
        ([{"begun": 8}] * 4, True),
        ([{"begun": 8}, {"start": 8}, {"end": 138, "pairs_cached": 0}] * 4, True),
        ([{"begun": 8}, {"start": 8}, {"end": 138, "pairs_cached": 60}] * 4, False),
        ([{"begun": 8}, {"end": 2}] * 4, False),
    ],
    ids=[
        "four",
        "three",
        "one ended well",
        "four after that",
        "it had progressed",
        "a rollback between",
        "none",
        "each in two rows",
        "one that only loaded",
        "all only loaded",
        "no time for a step",
        "a growing cache",
        "mistakes",
    ],
)
def test_only_starts_in_a_row_that_failed_count(tmp_path, rows, stops):
    (tmp_path / STARTS).write_text(rows_of(*rows) + '{"start": 8')
    if stops:
        with pytest.raises(NoProgress, match="started 4 times from step 8"):
            check_progress(tmp_path, 8, 3)
    else:
        check_progress(tmp_path, 8, 3)
    check_progress(tmp_path, 8, None)


def test_what_failed_is_told_of_before_a_time_that_was_over(tmp_path):
    rows = [{"start": 8}, {"end": 138}, *[{"start": 8}, {"failed": "KeyError: x", "rank": 0, "step": 9}] * 3]
    (tmp_path / STARTS).write_text(rows_of(*rows))
    with pytest.raises(NoProgress, match="it ended with KeyError: x, on rank 0 at step 9"):
        check_progress(tmp_path, 8, 3)


def test_mistakes_in_what_is_given_are_no_failures_of_the_run(tmp_path, cli, capsys):
    run = [*TINY, "trainer.max_steps=2", "checkpoint.every_n_steps=1", f"run_dir={tmp_path}"]
    assert cli(*run) == 0
    for _ in range(3):
        assert cli(*run, "optim.lr=3e-3", "cluster.max_restarts=0") == 2
        assert "optim.lr: 0.0001 in the checkpoint, 0.003 now" in capsys.readouterr().err
    assert cli(*run, "cluster.max_restarts=0") == 0


def test_a_later_rank_does_not_count_the_start_that_the_first_has_announced(tmp_path):
    (tmp_path / STARTS).write_text(rows_of(*[{"begun": 8}] * 4))
    check_progress(tmp_path, 8, 3, first=False)
    with pytest.raises(NoProgress):
        check_progress(tmp_path, 8, 3)


def test_a_job_that_is_ended_while_it_loads_is_on_record(tmp_path, cache, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    announce(tmp_path / "absent", 0, "a")
    assert read(tmp_path / "absent") == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    announce(tmp_path / "job", 0, "a")
    assert [row["begun"] for row in read(tmp_path / "job")] == [0]


def test_a_start_that_had_no_folder_yet_leaves_nothing(tmp_path):
    note(tmp_path / "absent", start=0)
    assert read(tmp_path / "absent") == []
