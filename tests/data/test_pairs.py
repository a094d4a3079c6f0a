"""Every format of a row, and what a row without a preference or with a mistake is answered."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.data.pairs import Unusable, to_pair
from dpo_lightning.types import Pair, UserError

SAMPLES = Path(__file__).parents[3] / "shared" / "data"


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def gpt(sender: str, text: str) -> dict[str, str]:
    return {"from": sender, "value": text}


def row(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


Q, GOOD, BAD = user("Why?"), bot("Because."), bot("Dunno.")
ONE_TURN = ([Q], [GOOD], [BAD])
TALK = [user("Hi"), bot("Hello"), user("Why?")]

FORMATS = {
    "text": (row("Why?", "Because.", "Dunno."), ("Why?", "Because.", "Dunno.")),
    "text keeps its white space": (row(" Q\n", " a ", " b "), (" Q\n", " a ", " b ")),
    "text under question": ({"question": "Q", "chosen": "a", "rejected": "b"}, ("Q", "a", "b")),
    "text under instruction": ({"instruction": "Q", "chosen": "a", "rejected": "b"}, ("Q", "a", "b")),
    "prompt None, question text": ({"question": "Q", **row(None, "a", "b")}, ("Q", "a", "b")),
    "other columns are left alone": ({"id": 7, "margin": None, **row("Q", "a", "b")}, ("Q", "a", "b")),
    "messages": (row([Q], [GOOD], [BAD]), ONE_TURN),
    "messages, prompt repeated": (row([Q], [Q, GOOD], [Q, BAD]), ONE_TURN),
    "messages, prompt inside both": ({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, ONE_TURN),
    "messages, talk inside both": ({"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}, (TALK, [GOOD], [BAD])),
    "messages, talk repeated": (row(TALK, [*TALK, GOOD], [*TALK, BAD]), (TALK, [GOOD], [BAD])),
    "messages, prompt is the talk's start": (row(TALK[:1], [*TALK, GOOD], [*TALK, BAD]), (TALK, [GOOD], [BAD])),
    "messages, talk goes on in both": (row(TALK[:1], [*TALK[1:], GOOD], [*TALK[1:], BAD]), (TALK, [GOOD], [BAD])),
    "the whole talk under messages": ({"messages": [*TALK, GOOD], "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
                                      (TALK, [GOOD], [BAD])),
    "the whole talk beside answers alone": ({"messages": [Q, GOOD], "chosen": GOOD, "rejected": BAD}, ONE_TURN),
    "the last question beside the whole talk": (row("Why?", [*TALK, GOOD], [*TALK, BAD]), (TALK, [GOOD], [BAD])),
    "a prompt with more white space": (row("Why? ", [Q, GOOD], [Q, BAD]), ONE_TURN),
    "a system turn of its own, Orca's": ({"system": "Be kind.", "question": "Why?", "chosen": "a", "rejected": "b"},
                                         ([system("Be kind."), Q], [bot("a")], [bot("b")])),
    "a system turn beside a talk that has it": ({"system": "S", **row([system("S"), Q], [GOOD], [BAD])},
                                                ([system("S"), Q], [GOOD], [BAD])),
    "no system turn": ({"system": "", **row("Q", "a", "b")}, ("Q", "a", "b")),
    "Orca's input": ({"system": "Be kind.", "input": "Why?", "chosen": "a", "rejected": "b"},
                     ([system("Be kind."), Q], [bot("a")], [bot("b")])),
    "an input that is a null beside a prompt that is one": (
        {"input": float("nan"), "prompt": float("nan"), "question": "Q", "chosen": "a", "rejected": "b"},
        ("Q", "a", "b"),
    ),
    "an input beside whole messages": ({"input": "7f3a", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, ONE_TURN),
    "an input beside transcripts": (
        {"input": "7f3a", "chosen": "Human: Why?\n\nAssistant: a", "rejected": "Human: Why?\n\nAssistant: b"},
        ([Q], [bot("a")], [bot("b")]),
    ),
    "a system turn that is pandas' null": ({"system": float("nan"), **row("Q", "a", "b")}, ("Q", "a", "b")),
    "a blank system turn": ({"system": " \n", **row("Q", "a", "b")}, ("Q", "a", "b")),
    "Alpaca's input": ({"instruction": "Sum up:", "input": "It rained.", "chosen": "a", "rejected": "b"},
                       ("Sum up:\n\nIt rained.", "a", "b")),
    "Alpaca's empty input": ({"instruction": "Q", "input": "", "chosen": "a", "rejected": "b"}, ("Q", "a", "b")),
    "nothing in what is not read": ({"tools": None, "images": [], **row("Q", "a", "b")}, ("Q", "a", "b")),
    "the same question twice is a talk": (
        row([Q], [BAD, Q, GOOD], [BAD, Q, bot("No.")]),
        ([Q, BAD, Q], [GOOD], [bot("No.")]),
    ),
    "text prompt, messages": (row("Why?", [GOOD], [BAD]), ONE_TURN),
    "text prompt, messages repeat it (ultrafeedback)": (row("Why?", [Q, GOOD], [Q, BAD]), ONE_TURN),
    "text prompt, messages repeat it behind a system turn": (
        row("Why?", [system("Be kind."), Q, GOOD], [system("Be kind."), Q, BAD]),
        ([system("Be kind."), Q], [GOOD], [BAD]),
    ),
    "messages prompt, text answers": (row([Q], "Because.", "Dunno."), ONE_TURN),
    "one message without a list": (row(Q, GOOD, BAD), ONE_TURN),
    "system turn": (row([system("Be kind."), Q], [GOOD], [BAD]), ([system("Be kind."), Q], [GOOD], [BAD])),
    "text prompt before a messages column (ultrafeedback)": (
        {**row("Why?", [Q, GOOD], [Q, BAD]), "messages": [Q, GOOD]},
        ONE_TURN,
    ),
    "context under messages": ({"messages": [Q], "chosen": [GOOD], "rejected": [BAD]}, ONE_TURN),
    "other keys of a message are dropped": (row([{**Q, "name": "x"}], [GOOD], [BAD]), ONE_TURN),
    "transcript": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: Dunno."},
        ONE_TURN,
    ),
    "transcript without leading lines": (
        {"chosen": "Human: Why?\n\nAssistant: Because.", "rejected": "Human: Why?\n\nAssistant: Dunno."},
        ONE_TURN,
    ),
    "transcript of several turns": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Dunno.",
        },
        (TALK, [GOOD], [BAD]),
    ),
    "transcript with empty lines inside turns": (
        {
            "chosen": "\n\nHuman: One.\n\nTwo.\n\n\nThree.\n\nAssistant: A list:\n\n1. a\n\n2. b",
            "rejected": "\n\nHuman: One.\n\nTwo.\n\n\nThree.\n\nAssistant: Dunno.\n\n",
        },
        ([user("One.\n\nTwo.\n\n\nThree.")], [bot("A list:\n\n1. a\n\n2. b")], [BAD]),
    ),
    "transcript whose turn ends in a line break": (
        {"chosen": "\n\nHuman: Why?\n\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\n\nAssistant: Dunno."},
        ONE_TURN,
    ),
    "transcript that quotes a speaker inside a line": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Say\nHuman: no", "rejected": "\n\nHuman: Why?\n\nAssistant: Dunno."},
        ([Q], [bot("Say\nHuman: no")], [BAD]),
    ),
    "transcript cut before the answer (full-hh-rlhf)": (
        row("\n\nHuman: Why?\n\nAssistant:", " Because.", " Dunno."),
        ONE_TURN,
    ),
    "transcript of several turns cut before the answer": (
        row("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: ", "Because.", "Dunno.\n"),
        (TALK, [GOOD], [BAD]),
    ),
    "transcript cut before the answer, and whole": (
        row("\n\nHuman: Why?\n\nAssistant:", "Human: Why?\n\nAssistant: Because.", "Human: Why?\n\nAssistant: Dunno."),
        ONE_TURN,
    ),
    "whole transcripts beside their question": (
        row("Why?", "\n\nHuman: Why?\n\nAssistant: Because.", "\n\nHuman: Why?\n\nAssistant: Dunno."),
        ONE_TURN,
    ),
    "whole transcripts beside their last question": (
        row(
            "Why?",
            "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Because.",
            "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Dunno.",
        ),
        (TALK, [GOOD], [BAD]),
    ),
    "transcript with a system turn of its own": (
        {"system": "Be kind.", **row("Human: Why?\n\nAssistant:", "Because.", "Dunno.")},
        ([system("Be kind."), Q], [GOOD], [BAD]),
    ),
    "transcript with Windows' line breaks": (
        row("\r\n\r\nHuman: Why?\r\n\r\nAssistant:", " Because.\r\n", " Dunno."),
        ONE_TURN,
    ),
    "text that quotes transcripts": (
        row("Go on: Human: Hi\n\nAssistant:", "So:\n\nHuman: a\n\nAssistant: b", "No"),
        ("Go on: Human: Hi\n\nAssistant:", "So:\n\nHuman: a\n\nAssistant: b", "No"),
    ),
    "answers that are dialogues": (
        row("Write one.", "Human: a\n\nAssistant: b", "Human: c\n\nAssistant: d"),
        ("Write one.", "Human: a\n\nAssistant: b", "Human: c\n\nAssistant: d"),
    ),
    "ShareGPT": (
        {"conversations": [gpt("human", "Why?")], "chosen": gpt("gpt", "Because."), "rejected": gpt("gpt", "Dunno.")},
        ONE_TURN,
    ),
    "ShareGPT with a system turn and a talk": (
        {
            "conversations": [
                gpt("system", "Be kind."), gpt("human", "Hi"), gpt("gpt", "Hello"), gpt("human", "Why?"),
            ],
            "chosen": gpt("gpt", "Because."),
            "rejected": gpt("gpt", "Dunno."),
        },
        ([system("Be kind."), *TALK], [GOOD], [BAD]),
    ),
    "roles by other names": (
        row([{"role": "developer", "content": "Be kind."}, gpt("prompter", "Why?")],
            [gpt("model", "Because.")], [gpt("chatgpt", "Dunno.")]),
        ([system("Be kind."), Q], [GOOD], [BAD]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_row_of_each_format_gives_its_pair(given: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    before = json.dumps(given)
    assert to_pair(given) == Pair(*expected)
    assert json.dumps(given) == before, "the row itself was altered"


UNUSABLE = {
    "equal text": (row("Q", "a", "a"), "chosen equals rejected"),
    "equal messages": ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "chosen equals rejected"),
    "empty chosen": (row("Q", "", "b"), "empty completion"),
    "blank rejected": (row("Q", "a", " \n\t"), "empty completion"),
    "no messages": (row([Q], [], [BAD]), "empty completion"),
    "blank message": (row([Q], [GOOD], [bot(" ")]), "empty completion"),
    "blank transcript answer": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant:"},
        "empty completion",
    ),
    "empty prompt": (row(" ", "a", "b"), "empty prompt"),
    "empty prompt of messages": (row([user("\n")], [GOOD], [BAD]), "empty prompt"),
    "empty text prompt beside messages": (row("", [GOOD], [BAD]), "empty prompt"),
    "user has the last word": ({"chosen": [Q, GOOD, Q], "rejected": [Q, BAD]}, "does not end with the assistant"),
    "rejected is the prompt alone": (row([Q], [Q, GOOD], [Q]), "does not end with the assistant"),
    "talks part early": (
        {"chosen": [Q, GOOD, user("So?"), GOOD], "rejected": [Q, BAD, user("So?"), BAD]},
        "conversations part before the last answer",
    ),
    "rejected goes on where chosen ends": (
        {"chosen": [Q, GOOD], "rejected": [Q, GOOD, BAD]},
        "conversations part before the last answer",
    ),
    "questions differ": (
        {"chosen": [user("A?"), GOOD], "rejected": [user("B?"), BAD]},
        "conversations part before the last answer",
    ),
}


@pytest.mark.parametrize(("given", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_row_without_a_preference_is_unusable_for_a_reason(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as raised:
        to_pair(given)
    assert str(raised.value) == reason


MALFORMED = {
    "near name": ({"prompt": "Q", "choosen": "a", "rejected": "b"}, ["'chosen'", "rename 'choosen'"]),
    "KTO's": ({"prompt": "Q", "completion": "a", "label": True}, ["no 'chosen'", "KTO's; make pairs of"]),
    "rows in a row": ({"data": [{"prompt": "Q"}]}, ["no 'chosen' (found keys: data)", "the rows are in 'data': write"]),
    "near name of rejected": ({"prompt": "Q", "chosen": "a", "reject": "b"}, ["'rejected'", "rename 'reject'"]),
    "no near name": (
        {"prompt": "Q", "response_w": "a", "response_l": "b"},
        ["no 'chosen'", "found keys: prompt, response_w, response_l", "name the preferred answer 'chosen'"],
    ),
    "no keys": ({}, ["no 'chosen'", "found keys: none"]),
    "chosen None": (row("Q", None, "b"), ["'chosen' must be text or a list of messages", "NoneType"]),
    "both None, no prompt": (row(None, None, None), ["'chosen' must be text or a list of messages", "NoneType"]),
    "rejected not a number": (row("Q", "a", float("nan")), ["'rejected' must be text or a list", "float"]),
    "rejected a number": (row("Q", "a", 3), ["'rejected' must be text or a list", "int"]),
    "chosen bytes": (row("Q", b"a", "b"), ["'chosen' must be text or a list", "bytes"]),
    "prompt a number": (row(5, "a", "b"), ["'prompt' must be text or a list", "int"]),
    "question a number": ({"question": 5, "chosen": "a", "rejected": "b"}, ["'question' must be text or a list"]),
    "list of text": (row("Q", ["a"], ["b"]), ["'chosen' must be text or a list of messages", "a list of str"]),
    "unknown role": (row([{"role": "narrator", "content": "x"}], "a", "b"), ["'prompt'", "'narrator'", "assistant"]),
    "unknown role in conversations": (
        {"conversations": [gpt("narrator", "x")], "chosen": gpt("gpt", "a"), "rejected": gpt("gpt", "b")},
        ["'conversations'", "'narrator'", "known roles: system, developer, user, human"],
    ),
    "no role": (row([{"content": "x"}], "a", "b"), ["'prompt'", "role None"]),
    "role a list": (row([{"role": ["user"], "content": "x"}], "a", "b"), ["'prompt'", "role ['user']"]),
    "content None": (row([Q], [{"role": "assistant", "content": None}], [BAD]), ["'chosen'", "NoneType, not text"]),
    "no content": (row([Q], [GOOD], [{"role": "assistant"}]), ["'rejected'", "NoneType, not text"]),
    "content in parts": (
        row([{"role": "user", "content": [{"type": "image"}]}], [GOOD], [BAD]),
        ["'prompt'", "list, not text"],
    ),
    "text without a prompt": (
        {"chosen": "a", "rejected": "b"},
        ["'chosen'", "transcript", "(found keys: chosen, rejected)", "rename the key of what was asked to 'prompt'"],
    ),
    "transcript beside plain text": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "Dunno."},
        ["'rejected'", "'prompt'", "transcript"],
    ),
    "transcript with a preamble": (
        {"chosen": "Be kind.\n\nHuman: Why?\n\nAssistant: a", "rejected": "Be kind.\n\nHuman: Why?\n\nAssistant: b"},
        ["'chosen'", "before its first 'Human:'", "remove it"],
    ),
    "tools": ({"tools": [{"type": "function"}], **row([Q], [GOOD], [BAD])}, ["'tools'", "not read"]),
    "a tool call": (row([Q], [{**GOOD, "tool_calls": [{"name": "f"}]}], [BAD]), ["'chosen'", "'tool_calls'"]),
    "messages as pandas writes them": (row("Q", str([GOOD]), str([BAD])), ["written as text", "json or parquet"]),
    "messages as json.dumps writes them": (
        {"chosen": json.dumps([Q, GOOD], indent=1), "rejected": json.dumps([Q, BAD])},
        ["written as text"],
    ),
    "reasoning": (row([Q], [{**GOOD, "reasoning": "hm"}], [BAD]), ["'chosen'", "'reasoning'"]),
    "two system turns": ({"system": "S", **row([system("T"), Q], [GOOD], [BAD])}, ["'system'", "leave one"]),
    "system a number": ({"system": 3, **row("Q", "a", "b")}, ["'system'", "found int"]),
    "answers alone": ({"chosen": [GOOD], "rejected": [BAD]}, ["no prompt"]),
    "empty prompt list": (row([], "a", "b"), ["no prompt"]),
    "half a character": (row("Q", "a", "\ud83d oops"), ["'rejected'", "'\\ud83d'", "remove it"]),
    "half a character in a message": (row([user("\udc00")], [GOOD], [BAD]), ["'prompt'", "'\\udc00'"]),
}


@pytest.mark.parametrize(("given", "parts"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_refused_with_its_key_and_the_remedy(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        to_pair(given)
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


def test_any_mixture_of_values_gives_a_pair_or_one_of_the_two_errors() -> None:
    values = [
        None, "", "x", "\n\nHuman: a\n\nAssistant: b", 0, 1.5, True, [], {}, [[]], ["x"], [None], b"x", "\ud800",
        [Q], [GOOD], [Q, GOOD], [Q, BAD], [{"role": "user"}], [{"role": {}, "content": "x"}], {"from": "gpt"},
        {"from": "gpt", "value": "x"}, [{"role": None, "content": "x"}], [{"role": "user", "content": 3}],
    ]  # fmt: skip
    ends: Counter[str] = Counter()
    for prompt in values:
        for chosen in values:
            for rejected in values:
                try:
                    ends[type(to_pair(row(prompt, chosen, rejected))).__name__] += 1
                except (Unusable, UserError) as error:
                    ends[type(error).__name__] += 1
    assert set(ends) == {"Pair", "Unusable", "UserError"}
    assert ends.total() == len(values) ** 3


def census(rows: list[dict[str, Any]]) -> tuple[list[Pair], Counter[str]]:
    pairs, ends = [], Counter()
    for given in rows:
        try:
            pairs.append(to_pair(given))
        except Unusable as reason:
            ends[str(reason)] += 1
    return pairs, ends


def test_the_sample_of_anthropic_hh_is_read_whole() -> None:
    file = SAMPLES / "hh-harmless-1000.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        pairs, ends = census([json.loads(line) for line in lines])
    assert (len(pairs), ends) == (997, {"empty completion": 3})
    first = pairs[0]
    assert [turn["role"] for turn in first.prompt] == ["user", "assistant", "user", "assistant", "user"]  # type: ignore[index]
    assert first.prompt[0] == {"role": "user", "content": "what are some pranks with a pen i can do?"}
    assert all(type(turn["content"]) is str for part in first for turn in part)  # type: ignore[index]
    assert all(pair.prompt[-1]["role"] == "user" for pair in pairs)  # type: ignore[index]
    assert all([turn["role"] for side in pair[1:] for turn in side] == ["assistant"] * 2 for pair in pairs)  # type: ignore[index]


def test_the_sample_of_sharegpt_is_read_whole() -> None:
    file = SAMPLES / "sharegpt-dpo-100.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    pairs, ends = census(json.loads(file.read_text(encoding="utf-8")))
    assert (len(pairs), ends) == (100, {})
    assert [len(part) for part in pairs[0]] == [1, 1, 1]
    assert pairs[0].prompt[0]["content"].startswith("Hi! I'd like to create a new language game")  # type: ignore[index]
    assert Counter(len(pair.prompt) for pair in pairs) == {1: 34, 2: 29, 5: 20, 7: 17}
    assert sum(pair.prompt[0]["role"] == "system" for pair in pairs) == 29  # type: ignore[index]
