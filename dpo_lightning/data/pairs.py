r"""A row, in any of the formats that preference data comes in, becomes a Pair. No switch: the row tells.

{"prompt": "...", "chosen": "...", "rejected": "..."}                        text
{"prompt": [...], "chosen": [...], "rejected": [...]}                        messages, prompt repeated or not
{"chosen": [...], "rejected": [...]}                                         messages, prompt inside both
{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "..."}            Anthropic HH's transcripts
{"conversations": [{"from": "human", "value": ...}], "chosen": {...}, ...}   ShareGPT
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from dpo_lightning.types import Message, Pair, UserError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
CONTEXT_KEYS = ("prompt", "conversations", "messages", "question", "instruction")
SPEAKER = re.compile(r"\A(Human|Assistant):")


class Unusable(Exception):
    """A well-formed row that holds no preference to learn from; the text is the reason, for counting."""


def to_pair(row: dict[str, Any]) -> Pair:
    """Recognise a row's format and return its pair.

    Raises UserError for a malformed row and Unusable for one that says nothing: both sides equal, an empty
    completion, or conversations that part before the last answer.
    """
    for key in ("chosen", "rejected"):
        if key not in row:
            close = difflib.get_close_matches(key, [str(k) for k in row], n=1, cutoff=0.5)
            hint = f"; rename {close[0]!r}" if close else ""
            raise UserError(f"no {key!r} (found keys: {', '.join(map(str, row)) or 'none'}){hint}")
    context = next((row[key] for key in CONTEXT_KEYS if row.get(key) is not None), None)
    chosen, rejected = row["chosen"], row["rejected"]
    if context is None and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = transcript(chosen, "chosen"), transcript(rejected, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(context, str):
        pair = Pair(context, chosen, rejected)
    else:
        pair = _conversation(context, chosen, rejected)
    return _with_preference(pair)


def transcript(text: str, key: str) -> list[Message]:
    """Parse Anthropic HH's form: blocks that open with 'Human:' or 'Assistant:', separated by empty lines."""
    turns: list[Message] = []
    for part in text.split("\n\n"):
        speaker = SPEAKER.match(part)
        if speaker:
            role = "user" if speaker[1] == "Human" else "assistant"
            turns.append({"role": role, "content": part[speaker.end() :]})
        elif turns:
            turns[-1]["content"] += "\n\n" + part
    if not turns:
        raise UserError(f"{key!r} is text without a 'prompt' beside it, and no 'Human: ... Assistant: ...' transcript")
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]


def _conversation(context: Any, chosen: Any, rejected: Any) -> Pair:
    """Return a pair of messages; what both sides open with moves into the prompt."""
    prompt = [] if context is None else messages(context, "prompt", "user")
    sides = [messages(side, key, "assistant") for side, key in ((chosen, "chosen"), (rejected, "rejected"))]
    if all(side[: len(prompt)] == prompt for side in sides):
        sides = [side[len(prompt) :] for side in sides]
    if not all(sides):
        raise Unusable("empty completion")
    shared = 0
    shortest = min(map(len, sides))
    while shared < shortest - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    prompt, sides = prompt + sides[0][:shared], [side[shared:] for side in sides]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise Unusable("does not end with the assistant")
    if any(len(side) > 1 for side in sides):
        raise Unusable("conversations part before the last answer")
    if not prompt:
        raise UserError("no prompt: neither a 'prompt' nor turns before the last answer")
    return Pair(prompt, sides[0], sides[1])


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
    if role not in ROLES:
        raise UserError(f"{key!r} has a message of role {role!r}; known roles: {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def _with_preference(pair: Pair) -> Pair:
    if pair.chosen == pair.rejected:
        raise Unusable("chosen equals rejected")
    for side in (pair.chosen, pair.rejected):
        if not (side if isinstance(side, str) else side[-1]["content"]).strip():
            raise Unusable("empty completion")
    if isinstance(pair.prompt, str) and not pair.prompt.strip():
        raise Unusable("empty prompt")
    return pair
