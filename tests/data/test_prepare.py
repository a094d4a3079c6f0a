"""Rows to a table of token ids: what is counted, what is kept, what is held out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import resource
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_lightning.data import prepare as room
from dpo_lightning.data.datamodule import PreferenceData
from dpo_lightning.data.prepare import Census, most_common, prepare, split, tokenizer_digest, validate
from dpo_lightning.data.sources import FileSource
from dpo_lightning.model.tiny import byte_tokenizer
from dpo_lightning.types import UserError

ROWS = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def source(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> FileSource:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FileSource(str(file))


def made(given: FileSource, tokenizer: Any, max_length: int = 100, template: str = "plain", most: int | None = None):
    validate(given)
    return prepare(given, tokenizer, max_length, template, most)


def text(tokenizer: Any, table: Any, row: int = 0) -> tuple[str, str, str]:
    prompt, chosen, rejected = (tokenizer.decode(table[row][side]) for side in ("prompt", "chosen", "rejected"))
    return prompt, chosen, rejected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of pairs of each call of the tokenizer, as they happen."""
    seen: list[int] = []
    real = room.tokenize_pairs

    def counting(pairs: Any, *rest: Any) -> Any:
        seen.append(len(pairs))
        return real(pairs, *rest)

    monkeypatch.setattr(room, "tokenize_pairs", counting)
    return seen


def test_a_table_holds_ids_key_and_question(tmp_path: Path, tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "W"},
    ]
    table, census = made(source(tmp_path, [*ROWS, {**ROWS[0], "prompt": talk}]), tokenizer)
    assert census == Census(rows=7, pairs=7, truncated=0, conversations=1, skipped={})
    assert table.column_names == ["prompt", "chosen", "rejected", "lengths", "key", "prompt_key", "question"]
    keys = [bytes(key) for key in table["key"]]
    assert {len(key) for key in keys} == {16} and len({*keys}) == len(keys)
    assert text(tokenizer, table, 4) == ("<|bos|>Q4", "yes 4<|end|>", "no 4<|end|>")
    assert table[4]["lengths"] == [3, 6, 5]
    assert table[6]["question"] == "W"
    assert table["question"][:3] == ["Q0", "Q1", "Q2"]
    assert [table.features[name].dtype for name in ("prompt_key", "question")] == ["int64", "string"]
    assert table.features["prompt"].feature.dtype == "int32"


def test_the_census_counts_every_row_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *ROWS,
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "", "rejected": "b"},
        {"prompt": "Q", "chosen": "a long start, then A", "rejected": "a long start, then B"},
        {"prompt": "Q" * 30, "chosen": "A", "rejected": "B"},
    ]
    table, census = made(source(tmp_path, rows), tokenizer, 16)
    skipped = {"chosen equals rejected": 2, "empty completion": 1, "equal as tokens": 1}
    assert census == Census(rows=11, pairs=7, truncated=1, skipped=skipped)
    assert len(table) == census.pairs
    assert census.rows == census.pairs + sum(census.skipped.values())
    assert most_common(census) == "2 chosen equals rejected, 1 empty completion, 1 equal as tokens"
    assert most_common(Census()) == ""


def test_batches_of_the_tokenizer_do_not_show(
    tmp_path: Path, tokenizer: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS, {"prompt": "Q", "chosen": "", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": "b"}]
    whole, census = made(source(tmp_path, rows), tokenizer)
    monkeypatch.setattr(room, "TOKENIZER_BATCH", 3)
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "other"))
    dealt, dealt_census = made(source(tmp_path, rows), tokenizer)
    assert calls == [7, 3, 3, 1]
    assert dealt.to_list() == whole.to_list()
    assert dealt_census == census


def test_the_same_rows_are_tokenised_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, census = made(source(tmp_path, [*ROWS, {**ROWS[0], "chosen": ""}]), tokenizer)

    def never(*_: Any) -> Any:
        raise AssertionError("the rows were read or tokenised a second time")

    monkeypatch.setattr(room, "tokenize_pairs", never)
    monkeypatch.setattr(room, "to_pair", never)
    again = FileSource(str((tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")))
    second, second_census = made(again, byte_tokenizer())
    assert second.to_list() == first.to_list()
    assert second_census == census == Census(rows=7, pairs=6, truncated=0, skipped={"empty completion": 1})


def test_what_changes_the_ids_makes_a_new_table(tmp_path: Path, tokenizer: Any, calls: list[int]) -> None:
    given = source(tmp_path, ROWS)
    assert text(tokenizer, made(given, tokenizer)[0]) == ("<|bos|>Q0", "yes 0<|end|>", "no 0<|end|>")
    assert text(tokenizer, made(given, tokenizer, 6)[0]) == ("<|bos|>Q0", "yes", "no ")
    assert text(tokenizer, made(given, tokenizer, template="chat")[0])[0] == (
        "<|bos|><|start|>user\nQ0<|end|><|start|>assistant\n"
    )
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert text(tokenizer, made(given, tokenizer, template="chat")[0]) == ("[Q0]", "[yes 0]<|end|>", "[no 0]<|end|>")
    tokenizer.eos_token = "<|pad|>"
    assert text(tokenizer, made(given, tokenizer)[0]) == ("<|bos|>Q0", "yes 0<|pad|>", "no 0<|pad|>")
    changed = source(tmp_path, [{**ROWS[0], "prompt": "New"}, *ROWS[1:]])
    assert text(tokenizer, made(changed, tokenizer)[0])[0] == "<|bos|>New"
    assert len(made(changed, tokenizer, most=4)[0]) == 4
    assert calls == [6, 6, 6, 6, 6, 6, 4]
    made(source(tmp_path, ROWS), byte_tokenizer(), 6)
    assert calls == [6, 6, 6, 6, 6, 6, 4], "the older table is still there"


def test_the_tokenizers_digest_is_that_of_its_ids() -> None:
    first, second = byte_tokenizer(), byte_tokenizer()
    assert tokenizer_digest(first) == tokenizer_digest(second)
    second(["a", "bcd"], padding=True)
    second("a")
    assert tokenizer_digest(first) == tokenizer_digest(second), "its use changes it"
    seen = {tokenizer_digest(first)}
    for change in (
        lambda: second.add_tokens(["new"]),
        lambda: setattr(second, "bos_token", "<|start|>"),
        lambda: setattr(second, "chat_template", "x"),
        lambda: setattr(second, "chat_template", None),
    ):
        change()
        assert tokenizer_digest(second) not in seen
        seen.add(tokenizer_digest(second))


def test_max_pairs_stops_after_so_many_usable_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**ROWS[0], "chosen": ""}, *ROWS, {**ROWS[0], "chosen": " "}]
    table, census = made(source(tmp_path, rows), tokenizer, most=2)
    assert table["question"][:] == ["Q0", "Q1"]
    assert census == Census(rows=3, pairs=2, truncated=0, skipped={"empty completion": 1})
    assert len(made(source(tmp_path, rows), tokenizer, most=100)[0]) == 6


def test_a_table_that_was_not_finished_is_made_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.exceptions import DatasetGenerationError

    given, real = source(tmp_path, ROWS), room.tokenize_pairs

    def stumbling(pairs: Any, *rest: Any) -> Any:
        if pairs[0].prompt == "Q4":
            raise OSError("disk full")
        return real(pairs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(room, "TOKENIZER_BATCH", 2)
        patch.setattr(room, "tokenize_pairs", stumbling)
        with pytest.raises(DatasetGenerationError) as raised:
            made(given, tokenizer)
        assert str(raised.value.__cause__) == "disk full"
    table, census = made(given, tokenizer)
    assert (len(table), census.pairs) == (6, 6)


DAMAGES: dict[str, tuple[str, Any]] = {
    "cut": ("generator/*/*/*.arrow", lambda file: os.truncate(file, file.stat().st_size // 2)),
    "emptied": ("generator/*/*/*.arrow", lambda file: os.truncate(file, 0)),
    "gone": ("generator/*/*/*.arrow", Path.unlink),
    "emptied description": ("generator/*/*/*.json", lambda file: os.truncate(file, 0)),
    "cut census": ("*.json", lambda file: os.truncate(file, 10)),
    "other census": ("*.json", lambda file: file.write_text('{"rows": 7, "pairs": 7}')),
    "no census": ("*.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_told_of_and_made_again(
    damage: str, tmp_path: Path, cache: Path, tokenizer: Any, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path, ROWS)
    assert len(made(given, tokenizer)[0]) == 6
    name, change = DAMAGES[damage]
    (file,) = (cache / "data").glob(name)
    change(file)
    table, census = made(given, tokenizer)
    assert (text(tokenizer, table, 4)[1], census) == ("yes 4<|end|>", Census(rows=6, pairs=6))
    out = capsys.readouterr().out
    assert re.fullmatch(
        rf"warning: {cache}/data/generator/\S+ cannot be read \(.+\): the rows are tokenised again\n", out
    )
    assert calls == [6, 6]
    made(given, tokenizer)
    assert calls == [6, 6] and capsys.readouterr().out == ""


def told_of(cache: Path, why: str) -> str:
    remedy = "free space or set DPO_LIGHTNING_CACHE to another folder"
    return re.escape(f"the cache {cache} cannot be written ({why}); {remedy}") + "$"


@pytest.mark.filterwarnings("ignore:flock not supported")  # datasets' own lock is a file then
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert len(made(source(tmp_path, ROWS), tokenizer)[0]) == 6


def test_a_cache_that_cannot_be_written_is_told_in_a_line(
    tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(tmp_path, ROWS)
    cache.touch()  # a file in the folder's place
    with pytest.raises(UserError, match=told_of(cache, "Not a directory")):
        validate(given)
    with pytest.raises(UserError, match=told_of(cache, "Not a directory")):
        prepare(given, tokenizer, 100, "plain", None)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cache.unlink()
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=told_of(cache, "Read-only file system")):
        validate(given)


@pytest.mark.parametrize("room_for", [100, 20_000])  # the first write, the table in its midst
def test_a_cache_on_a_full_disk_is_told_in_a_line(room_for: int, tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    given = source(tmp_path, [{**row, "chosen": row["chosen"] * 500} for row in ROWS])
    validate(given)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_for, limit[1]))
    try:
        with pytest.raises(UserError, match=told_of(cache, "File too large")):
            prepare(given, tokenizer, 4000, "plain", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert len(prepare(given, tokenizer, 4000, "plain", None)[0]) == 6


def test_the_users_mistakes_come_through_the_table_maker_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    talk = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"use data.template=plain"):
        made(source(tmp_path, ROWS), tokenizer, template="chat")
    with pytest.raises(UserError, match=r"give model.tokenizer="):
        made(source(tmp_path, [talk]), tokenizer)
    tokenizer.chat_template = "{% if '3' in messages[0]['content'] %}{{ raise_exception('no threes') }}{% endif %}Q"
    with pytest.raises(UserError, match=r"^rows\.jsonl line 4: the chat template refuses .*\(no threes\); remove such"):
        made(source(tmp_path, ROWS), tokenizer, template="chat")
    alike = [{**row, "chosen": "so far alike, yes", "rejected": "so far alike, no"} for row in ROWS]
    with pytest.raises(UserError) as raised:
        made(source(tmp_path, alike), tokenizer, 14)
    assert str(raised.value) == ("rows.jsonl: no usable pair within data.max_length=14 (6 equal as tokens); raise it")
    assert made(source(tmp_path, alike), tokenizer, 24)[1].pairs == 6
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # as of a template that knows no role "assistant"
    with pytest.raises(UserError, match=r"no usable pair \(6 equal as tokens\): the tokenizer or its chat template"):
        made(source(tmp_path, ROWS), tokenizer, template="chat")


def refusal(given: FileSource) -> list[str]:
    with pytest.raises(UserError) as raised:
        validate(given)
    return str(raised.value).splitlines()


def test_bad_rows_are_named_up_to_five_and_the_rest_counted(tmp_path: Path) -> None:
    bad = {"prompt": "Q", "chosen": None, "rejected": "b"}
    name = "'chosen' must be text or a list of messages, found NoneType"
    assert refusal(source(tmp_path, [ROWS[0], bad, ROWS[1], bad])) == [
        f"rows.jsonl line 2: {name}",
        f"rows.jsonl line 4: {name}",
    ]
    assert refusal(source(tmp_path, [bad] * 5)) == [f"rows.jsonl line {i}: {name}" for i in (1, 2, 3, 4, 5)]
    assert refusal(source(tmp_path, [*ROWS, *[bad] * 8])) == [
        *[f"rows.jsonl line {i}: {name}" for i in (7, 8, 9, 10, 11)],
        "... and 3 more bad rows",
    ]


def test_rows_that_were_refused_are_read_again(tmp_path: Path) -> None:
    bad = source(tmp_path, [*ROWS, {"prompt": "Q"}])
    assert refusal(bad) == refusal(bad)
    validate(source(tmp_path, ROWS))
    assert refusal(source(tmp_path, [*ROWS, {"prompt": "Q"}])) != []


def test_bytes_that_have_passed_as_one_kind_of_file_are_refused_as_another(tmp_path: Path, tokenizer: Any) -> None:
    made(source(tmp_path, ROWS), tokenizer)
    assert "unknown kind of file" in refusal(source(tmp_path, ROWS, "rows.txt"))[0]
    assert refusal(source(tmp_path, ROWS, "rows.csv")) != []


def test_a_file_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    remedy = "give rows with a prompt and two different answers"
    equal, empty = {"prompt": "Q", "chosen": "a", "rejected": "a"}, {"prompt": "Q", "chosen": "", "rejected": "b"}
    assert refusal(source(tmp_path, [equal, empty, equal])) == [
        f"rows.jsonl: no usable pair (2 chosen equals rejected, 1 empty completion); {remedy}"
    ]
    assert refusal(source(tmp_path, [])) == [f"rows.jsonl: no usable pair (it has no rows); {remedy}"]


def test_a_broken_line_ends_the_validation(tmp_path: Path) -> None:
    given = source(tmp_path, ROWS)
    with Path(given.path).open("a") as stream:
        stream.write("{")
    assert refusal(given) == [
        "rows.jsonl line 7: not JSON (Expecting property name enclosed in double quotes at column 2); mend or remove it"
    ]


def both(keys: list[int], share: float) -> tuple[list[int], list[int]]:
    train, val = split(np.array(keys), share)
    return train.tolist(), val.tolist()


def test_split_literally() -> None:
    assert both([5, -3, 9, -3], 0.25) == ([1, 2, 3], [0])
    assert both([5, -3, 9, -3], 0.5) == ([0, 2], [1, 3])
    assert both([5, -3, 9, -3], 0.75) == ([2], [0, 1, 3])
    assert both([5, -3, 9, -3], 0.99) == ([2], [0, 1, 3]), "one prompt is left for training"
    assert both([7, 8], 0.001) == ([1], [0]), "one prompt is held out"
    assert both([-3] * 60 + [*range(40)], 0.15) == ([*range(60), *range(75, 100)], [*range(60, 75)])
    assert both([5, -3, -3], 0) == both([5, -3, -3], 0.0) == ([0, 1, 2], []), "nothing is held out"
    assert both([-3] * 4 + [1, 1, 2, 2], 0.1) == ([0, 1, 2, 3, 6, 7], [4, 5]), "every prompt has more than is wanted"


def test_split_holds_out_whole_prompts_the_exact_share_and_the_same_ones_in_any_order() -> None:
    dice = random.Random(3)
    for _ in range(200):
        prompts = [dice.randint(-(2**63), 2**63 - 1) for _ in range(dice.randint(2, 60))]
        once = dice.random() < 0.5
        keys = prompts if once else [*prompts, *dice.choices(prompts, k=dice.randint(0, 60))]
        share = dice.choice((0.01, 0.1, 0.15, 0.5, 0.9, 0.999))
        train, val = both(keys, share)
        assert sorted(train + val) == list(range(len(keys)))
        assert (train, val) == (sorted(train), sorted(val))
        held, kept = {keys[row] for row in val}, {keys[row] for row in train}
        assert held and kept and not held & kept
        wanted = min(max(1, round(len(keys) * share)), len(keys) - 1)
        if once:
            assert len(val) == wanted
        rows_of = Counter(keys)
        assert len(val) <= wanted or [rows_of[key] for key in held] == [min(rows_of.values())]
        assert all(rows_of[key] > wanted - len(val) for key in kept), "no other one fits"
        mixed = dice.sample(keys, len(keys))
        assert {mixed[row] for row in both(mixed, share)[1]} == held


def test_one_prompt_alone_is_not_split() -> None:
    with pytest.raises(UserError, match=r"one prompt alone cannot be split.* give data.val_path=FILE"):
        both([4, 4, 4], 0.5)


def data(path: Path, tokenizer: Any, **options: Any) -> PreferenceData:
    loader = options.pop("load_tokenizer", lambda: tokenizer)
    options = {"val_fraction": 0.15, **options}
    return PreferenceData(load_tokenizer=loader, seed=0, max_length=64, batch_size=2, path=str(path), **options)


def test_the_held_out_prompts_are_the_same_whatever_the_order_and_not_trained_on(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"prompt": f"Q{i % 20}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    held = []
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        one = data(Path(source(tmp_path, order, name).path), tokenizer, val_fraction=0.25)
        one.prepare_data()
        assert (len(one.train), len(one.val)) == (30, 10)
        assert not {*one.train["question"]} & {*one.val["question"]}
        held.append({*one.val["question"]})
    assert held[0] == held[1]
    assert len(held[0]) == 5


def test_a_validation_file_is_taken_whole(tmp_path: Path, tokenizer: Any) -> None:
    train, val = source(tmp_path, ROWS, "train.jsonl"), source(tmp_path, ROWS[:2], "val.jsonl")
    one = data(Path(train.path), tokenizer, val_path=val.path)
    one.prepare_data()
    assert (len(one.train), len(one.val)) == (6, 2)
    assert one.census == Census(rows=6, pairs=6)
    lengths = one.lengths(one.train.select([5, 0]))
    assert lengths.tolist() == [[21, 6, 5], [21, 6, 5]]
    one.tokenizer = None
    one.setup("fit")
    assert one.tokenizer is None, "what is prepared is not prepared again"


def test_the_pairs_that_steps_have_taken_are_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**ROWS[0], "prompt": f"Q{i}"} for i in range(11)]
    one: Any = data(Path(source(tmp_path, rows).path), tokenizer, val_path=source(tmp_path, ROWS, "val.jsonl").path)
    one.prepare_data()
    trainer = {"limit_train_batches": 1.0, "accumulate_grad_batches": 2, "global_rank": 0, "world_size": 1}
    one.trainer = SimpleNamespace(**trainer)
    assert [one.seen(steps) for steps in (1, 2, 3, 4, 7)] == [4, 8, 11, 11, 11]
    one.trainer.limit_train_batches = 4  # of 6: each epoch has other pairs
    met = {*one.order().rows(0)[:8].tolist(), *one.order().rows(1)[:4].tolist()}
    assert [one.seen(steps) for steps in (2, 3)] == [8, len(met)]
    assert 8 < len(met) < 12


def test_rows_are_judged_before_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the tokenizer was loaded")

    good, bad = source(tmp_path, ROWS, "good.jsonl"), source(tmp_path, [{"prompt": "Q"}], "bad.jsonl")
    for path, val_path in ((bad.path, None), (good.path, bad.path)):
        with pytest.raises(UserError, match=r"bad.jsonl line 1: no 'chosen'"):
            data(Path(path), None, val_path=val_path, load_tokenizer=never).prepare_data()
