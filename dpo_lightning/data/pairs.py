r"""A row, in any of the formats that preference data comes in, becomes a Pair. No switch: the row tells.

{"prompt": "...", "chosen": "...", "rejected": "..."}                        text
{"prompt": [...], "chosen": [...], "rejected": [...]}                        messages, prompt repeated or not, or text
{"chosen": [...], "rejected": [...]}                                         messages, prompt inside both
{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "..."}            Anthropic HH's transcripts
{"prompt": "\n\nHuman: ...\n\nAssistant:", "chosen": "...", ...}             the same, cut before the answer
{"conversations": [{"from": "human", "value": ...}], "chosen": {...}, ...}   ShareGPT
{"system": "...", "question": "...", "chosen": "...", "rejected": "..."}     any of these with a system turn of its own
{"system": "...", "input": "...", "chosen": "...", "rejected": "..."}        the same, by Orca's other name
{"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}   Alpaca
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from dpo_lightning.types import Message, Pair, UserError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
CONTEXT_KEYS = ("prompt", "conversations", "messages", "question", "instruction")
# Parts of what the model sees that are not read: trained without them, a pair would say something else.
UNREAD = ("tools", "chat_template_kwargs", "images", "image", "videos", "history")
UNREAD_IN_TURN = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# What pandas and json.dumps make of a list of messages in a column of text.
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:.*\}\s*\]\s*""", re.S)
SPEAKER = re.compile(r"(?:\r?\n){2}(Human|Assistant):")
OPENS = re.compile(r"\s*Human:")
AWAITS_ANSWER = re.compile(r"\s*Human:.*(?:\r?\n){2}Assistant:\s*", re.S)


class Unusable(Exception):
    """A well-formed row that holds no preference to learn from; the text is the reason, for counting."""


def to_pair(row: dict[str, Any]) -> Pair:
    """Recognise a row's format and return its pair.

    Raises UserError for a malformed row and Unusable for one that says nothing: both sides equal, an empty
    completion, or conversations that part before the last answer.
    """
    for key in ("chosen", "rejected"):
        if key not in row:
            raise UserError(f"no {key!r} (found keys: {', '.join(map(str, row)) or 'none'}); {_remedy(row, key)}")
    for key in UNREAD:
        if row.get(key):
            raise UserError(f"{key!r} is part of what the model sees, and is not read; write it into the turns")
    context_key = next((key for key in CONTEXT_KEYS if _given(row, key) is not None), "prompt")
    context = _given(row, context_key)
    chosen, rejected = row["chosen"], row["rejected"]
    if all(isinstance(side, str) and WRITTEN.fullmatch(side) for side in (chosen, rejected)):
        raise UserError("'chosen' is a list of messages written as text; write the list itself, in json or parquet")
    if context is None and all(isinstance(side, str) and not OPENS.match(side) for side in (chosen, rejected)):
        context = _given(row, "input") or None  # beside whole conversations it may be anything
    if isinstance(chosen, str) and isinstance(rejected, str):
        context, chosen, rejected = _transcribed(row, context)
    if context_key == "instruction" and isinstance(context, str) and isinstance(row.get("input"), str):
        context = f"{context}\n\n{row['input']}".strip()
    system = [turn for turn in messages(_given(row, "system") or [], "system", "system") if turn["content"].strip()]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(context, str) and not system:
        pair = Pair(context, chosen, rejected)
    else:
        prompt = [] if context is None else messages(context, context_key, "user")
        pair = _conversation(
            _opened_by(system, prompt),
            messages(chosen, "chosen", "assistant"),
            messages(rejected, "rejected", "assistant"),
        )
    return _with_preference(pair)


def _given(row: dict[str, Any], key: str) -> Any:
    """Return what a row has under a key; None for NaN, which is pandas' null."""
    value = row.get(key)
    return None if isinstance(value, float) and math.isnan(value) else value


def _remedy(row: dict[str, Any], lacking: str) -> str:
    """Return what makes rows of pairs of rows like this one."""
    if {"completion", "label"} <= {*row}:
        return "rows of one answer and a label are KTO's; make pairs of a good and a bad answer to each prompt"
    if len(row) == 1 and isinstance(whole := next(iter(row.values())), list) and whole and isinstance(whole[0], dict):
        return f"the rows are in {next(iter(row))!r}: write that list alone, or one row a line"
    close = difflib.get_close_matches(lacking, [str(key) for key in row], n=1, cutoff=0.5)
    return f"rename {close[0]!r}" if close else "name the preferred answer 'chosen', the other 'rejected'"


def _opened_by(system: list[Message], prompt: list[Message]) -> list[Message]:
    """Return the prompt behind a system turn, which it may have itself."""
    if not system or prompt[:1] == system:
        return prompt
    if prompt and prompt[0]["role"] == "system":
        raise UserError("'system' and the conversation's own system turn differ; leave one of them out")
    return system + prompt


def _transcribed(row: dict[str, Any], context: Any) -> tuple[Any, Any, Any]:
    """Return context and sides with messages for the transcripts among them: whole ones, or cut before the answer."""
    chosen, rejected = row["chosen"], row["rejected"]
    if context is None:
        for key in ("chosen", "rejected"):
            if not SPEAKER.search(f"\n\n{row[key].lstrip()}"):
                raise UserError(
                    f"{key!r} is text without a 'prompt' beside it (found keys: {', '.join(map(str, row))}), and no "
                    "'Human: ... Assistant: ...' transcript; rename the key of what was asked to 'prompt'"
                )
        return None, transcript(chosen, "chosen"), transcript(rejected, "rejected")
    whole = [transcript(side, "chosen") for side in (chosen, rejected) if OPENS.match(side)]
    if len(whole) == 2 and whole[0][0] == whole[1][0]:  # two answers that are dialogues would open in two ways
        if isinstance(context, str) and OPENS.match(context):
            context = [turn for turn in transcript(context, "prompt") if turn["content"]]
        return context, whole[0], whole[1]
    if isinstance(context, str) and AWAITS_ANSWER.fullmatch(context):
        return None, transcript(context + chosen, "chosen"), transcript(context + rejected, "rejected")
    return context, chosen, rejected


def transcript(text: str, key: str) -> list[Message]:
    """Parse Anthropic HH's form: blocks that open with 'Human:' or 'Assistant:', separated by empty lines."""
    before, *parts = SPEAKER.split(f"\n\n{text.lstrip()}")  # then speaker, words, speaker, words, ...
    if before.strip():
        raise UserError(f"{key!r} has text before its first 'Human:'; move it into a turn or remove it")
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": role, "content": words.strip()} for role, words in zip(roles, parts[1::2], strict=True)]


def _conversation(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    """Return a pair of messages; what both sides open with moves into the prompt, which they may repeat."""
    if not chosen or not rejected:
        raise Unusable("empty completion")
    shared, shortest = 0, min(len(chosen), len(rejected))
    while shared < shortest - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    opening = chosen[:shared]
    system = [
        turn for turn in opening[:1] if turn["role"] == "system"
    ]  # the sides may have it where the prompt lacks it
    if prompt[-1:] in (chosen[-1:], rejected[-1:]):  # the whole conversation, its answer too
        prompt = prompt[:-1]
    if not _holds(opening, prompt) and not _holds(opening, system + prompt):
        opening = prompt + opening
    prompt = opening
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("does not end with the assistant")
    if len(chosen) > shared + 1 or len(rejected) > shared + 1:
        raise Unusable("conversations part before the last answer")
    if not prompt:
        raise UserError("no prompt: neither a 'prompt' nor turns before the last answer")
    return Pair(prompt, chosen[shared:], rejected[shared:])


def _holds(opening: list[Message], prompt: list[Message]) -> bool:
    """Return whether the sides repeat the prompt: what they open with begins or ends with it, but for white space."""
    theirs, ours = ([(turn["role"], turn["content"].strip()) for turn in part] for part in (opening, prompt))
    whole = bool(theirs) and theirs[0][0] != "assistant"  # else it goes on where the prompt has ended
    return theirs[: len(ours)] == ours or (whole and theirs[-len(ours) :] == ours)


def messages(value: Any, key: str, role: str) -> list[Message]:
    """Return text, one message or a list of them, in either of the two spellings, as messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{key!r} must be text or a list of messages, found {type(value).__name__}")
    return [_message(turn, key) for turn in value]


def _message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{key!r} must be text or a list of messages, found a list of {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise UserError(f"{key!r} has a message whose content is {type(content).__name__}, not text")
    for unread in UNREAD_IN_TURN:
        if turn.get(unread):
            raise UserError(f"{key!r} has a message with {unread!r}, which is not read; write it into its content")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{key!r} has a message of role {role!r}; known roles: {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def _with_preference(pair: Pair) -> Pair:
    texts = [[part] if isinstance(part, str) else [turn["content"] for turn in part] for part in pair]
    for key, parts in zip(Pair._fields, texts, strict=True):
        try:
            "".join(parts).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(
                f"{key!r} holds half of a character ({half}, a lone surrogate); mend or remove it"
            ) from None
    if pair.chosen == pair.rejected:
        raise Unusable("chosen equals rejected")
    if not all(parts[-1].strip() for parts in texts[1:]):
        raise Unusable("empty completion")
    if not texts[0][-1].strip():
        raise Unusable("empty prompt")
    return pair
