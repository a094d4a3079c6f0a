"""metrics.jsonl and the csv file: a disk that refuses them costs no training, and no row where it recovers."""

import json
import math
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_lightning.outputs import results
from dpo_lightning.outputs.report import write_report
from dpo_lightning.training import loggers
from dpo_lightning.training.loggers import JsonlLogger, closed, csv_logger
from dpo_lightning.types import UserError

FULL = Path("/dev/full")  # every write to it fails with ENOSPC


def steps(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.fixture
def logger(tmp_path):
    return JsonlLogger(tmp_path)


@pytest.fixture
def told(caplog):
    """Return what was logged since the last call."""
    caplog.set_level("INFO")

    def messages():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return messages


def log(logger, *numbers):
    for step in numbers:
        logger.log_metrics({"train/loss": 0.5}, step)


def test_a_full_disk_is_told_once_and_every_row_follows_when_it_is_freed(logger, tmp_path, told):
    file = logger.path
    log(logger, 1, 2)
    logger.path = FULL
    log(logger, 3, 4, 5)
    (line,) = told()
    assert line.startswith("warning: /dev/full cannot be written") and "No space left" in line
    logger.path = file
    log(logger, 6)
    assert steps(file) == [1, 2, 3, 4, 5, 6]
    assert told() == [f"{file} is written again, with the 4 rows that waited"]
    logger.close(0)
    assert told() == []


def test_memory_is_bounded_and_what_is_lost_is_counted(logger, told, monkeypatch):
    monkeypatch.setattr(loggers, "KEPT", 3)
    file, logger.path = logger.path, FULL
    log(logger, *range(5))
    assert len(logger._waiting) == 3
    logger.close(1)
    assert told()[-1] == "warning: /dev/full lacks 5 rows that could not be written"
    logger.path = file
    logger.close(0)
    assert steps(file) == [2, 3, 4]
    assert told()[-1] == f"warning: {file} lacks 2 rows that could not be written"


def test_a_row_that_fits_half_is_not_in_the_file(logger, told):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log(logger, 1)
    size = logger.path.stat().st_size
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))  # the disk is full within the next row
    try:
        log(logger, 2)
        assert logger.path.stat().st_size == size
        log(logger, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    log(logger, 4)
    assert steps(logger.path) == [1, 2, 3, 4]
    assert len(told()) == 2


def test_what_is_not_finite_is_null_and_is_left_out_by_all_that_read(logger, tmp_path):
    figures = {"val/loss": math.inf, "val/rewards/margins": 0.25, "val/rewards/chosen": math.nan}
    logger.log_metrics({"val/loss": 0.7}, 0)
    logger.log_metrics({"train/loss": 0.5, "train/grad_norm": -math.inf}, 1)
    logger.log_metrics(figures, 2)

    def no_json(word):
        raise AssertionError(word)

    lines = [json.loads(line, parse_constant=no_json) for line in logger.path.read_text().splitlines()]
    assert lines[1]["train/grad_norm"] is None and lines[2] == {"step": 2, **figures} | {
        "val/loss": None,
        "val/rewards/chosen": None,
    }
    with logger.path.open("a") as file:
        file.write('{"step": 3, "val/loss": NaN, "val/rewards/margins": -Infinity}\n')  # by an earlier version
    assert results.read_metrics(tmp_path)[1] == {"step": 1, "train/loss": 0.5}
    assert [row["step"] for row in results.validations(tmp_path)] == [0, 2]
    assert results.last(tmp_path, "val/rewards/margins") is results.last(tmp_path, "val/loss") is None
    assert "<td>0.7000</td><td>-</td>" in write_report(tmp_path).read_text()
    logger.rewind(2)
    assert steps(logger.path) == [0, 1, 2]


def test_rewind_drops_what_comes_later_and_what_was_cut_short(logger):
    logger.rewind(-1)
    assert logger.path.read_text() == ""  # it is there from the start: a run without a row can be reported, too
    log(logger, 0, 4, 4, 5)
    with logger.path.open("a") as file:
        file.write('{"step": 6, "tra')
    logger.rewind(4)
    assert steps(logger.path) == [0, 4, 4]
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("line", "why"),
    [(b"{bad", "not a line of JSON"), (b"\xff\0", "not a line of JSON"), (b"[1]", "not a row with a step")],
)
def test_rewind_names_a_line_that_is_no_row(line, why, logger):
    log(logger, 0)
    with logger.path.open("ab") as file:
        file.write(line + b"\n")
    log(logger, 1)
    written = logger.path.read_bytes()
    with pytest.raises(UserError) as raised:
        logger.rewind(0)
    assert str(raised.value) == f"{logger.path}, line 2: {why}; remove it"
    assert logger.path.read_bytes() == written


def test_the_csv_file_is_written_when_it_can_be(tmp_path, told, monkeypatch):
    (logger,) = csv_logger(tmp_path, {})
    file = tmp_path / "csv" / "version_0" / "metrics.csv"
    file.symlink_to(FULL)
    logger.log_metrics({"train/loss": 0.5}, 1)
    logger.finalize("success")
    assert "No space left" in told()[0]
    file.unlink()
    logger.log_metrics({"train/loss": 0.25}, 2)
    logger.finalize("success")
    assert file.read_text().splitlines()[1:] == ["1,0.5", "2,0.25"]


@pytest.mark.parametrize("fails", [False, True])
def test_loggers_are_closed_whatever_happens(fails):
    codes = []
    trainer = SimpleNamespace(loggers=[SimpleNamespace(close=codes.append), SimpleNamespace()])
    with pytest.raises(ZeroDivisionError) if fails else closed(trainer):  # type: ignore[arg-type]
        if fails:
            with closed(trainer):  # type: ignore[arg-type]
                _ = 1 / 0
    assert codes == [int(fails)]
