"""Pairs become token ids: prompt, chosen and rejected, where the prompt ends exactly where the completions begin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from dpo_lightning.types import Message, Pair, UserError

# Templates of Llama 3, SmolLM3, Granite, GPT-OSS and Mistral write today's date into every prompt by `strftime_now`,
# and the day must not change the data. It is that of Llama 3's template where nobody tells it one.
DAY = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
       "%H": "12", "%M": "00", "%S": "00"}  # fmt: skip
FIXED_DAY = (  # a macro in place of transformers' function; the '' keeps a newline that the template begins with
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('{code}', '{part}')" for code, part in DAY.items())
    + " }}{% endmacro %}{{ '' }}"
)


class Tokens(NamedTuple):
    """Token ids of a pair, and whether max_length cut anything."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool


def tokenize_pairs(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int, template: str = "auto", places: Sequence[str] | None = None
) -> list[Tokens | None]:
    """Tokenise pairs in one batch; None stands for a pair whose sides are equal once they are cut.

    Messages, and text where `template` says so, go through the tokenizer's chat template; other text is taken
    as it is, with the tokenizer's own BOS before it and one EOS behind. The prompt is the longest run of tokens
    that prompt + chosen, prompt + rejected and the prompt alone have in common.

    Raises UserError for a pair that cannot be written out, named by its place where places are given.
    """
    chat = use_chat(tokenizer, template)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so that no end can be learnt: give model.tokenizer= one that has"
        )
    rendered = []
    for at, pair in enumerate(pairs):
        try:
            rendered.append(_render(pair, tokenizer, chat))
        except UserError as error:
            raise UserError(f"{places[at]}: {error}" if places else str(error)) from None
    plain = [isinstance(pair.prompt, str) and not chat for pair in pairs]
    prompts, chosen, rejected = (_encode(texts, plain, tokenizer) for texts in zip(*rendered, strict=True))
    closing = _closing_ids(tokenizer)
    tokens = []
    for p, c, r in zip(prompts, chosen, rejected, strict=True):
        at = _common_prefix(p, c, r)
        sides = [_closed(ids[at:], closing, tokenizer) for ids in (c, r)]
        bos = tokenizer.bos_token_id
        prompt = p[:at] or [tokenizer.eos_token_id if bos is None else bos]  # something must predict the first token
        tokens.append(_cut(prompt, sides[0], sides[1], max_length, bos))
    return tokens


def use_chat(tokenizer: Any, template: str) -> bool:
    """Return whether text rows become a chat: 'auto' means where the tokenizer has a chat template."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("data.template=chat: this tokenizer has no chat template; use data.template=plain")
    return bool(tokenizer.chat_template) and template != "plain"


def _render(pair: Pair, tokenizer: Any, chat: bool) -> tuple[str, str, str]:
    prompt, chosen, rejected = pair
    if isinstance(prompt, str) and not chat:
        return prompt, f"{prompt}{chosen}", f"{prompt}{rejected}"
    if not tokenizer.chat_template:
        raise UserError(
            "the data are messages but the tokenizer has no chat template: give model.tokenizer= one that has, "
            "for instance the instruct variant's"
        )
    turns = [_turns(part, role) for part, role in zip(pair, ("user", "assistant", "assistant"), strict=True)]
    return _apply(turns[0], turns[0] + turns[1], turns[0] + turns[2], tokenizer)


def _turns(part: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def _apply(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], tokenizer: Any
) -> tuple[str, str, str]:
    """Render all three alike: as they are, or else with equal roles joined, or else with the system turn, too."""
    given = (prompt, chosen, rejected)
    template = _template(tokenizer)
    reason: Exception | None = None
    for merge in (list, _merge, partial(_merge, system=True)):
        try:
            p, c, r = (
                tokenizer.apply_chat_template(
                    merge(turns), chat_template=template, tokenize=False, add_generation_prompt=turns is prompt
                )
                for turns in given
            )
            return p, c, r
        except Exception as error:  # jinja raises what the template's author chose
            reason = reason or error
    roles = ", ".join(turn["role"] for turn in chosen)
    raise UserError(f"the chat template refuses the roles {roles} ({reason}); remove such rows") from None


def _template(tokenizer: Any) -> str:
    """Return the chat template, with a fixed day where it asks for today's."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # there are several, and none is the default
        raise UserError(f"model.tokenizer: {error}") from None
    return FIXED_DAY + template if "strftime_now" in template else template


def _merge(turns: list[Message], system: bool = False) -> list[Message]:
    """Join turns as a template like Gemma's wants them: roles alternate, the first user's carries the system's."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1]["role"] if merged else None
        if last == turn["role"] or (system and last == "system" and turn["role"] == "user"):
            merged[-1] = {"role": turn["role"], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def _encode(texts: Sequence[str], plain: list[bool], tokenizer: Any) -> list[list[int]]:
    """Encode; the tokenizer adds its BOS to plain text that does not open with one, never to a template's."""
    bos = tokenizer.bos_token or "\0"
    adds = [p and not text.startswith(bos) for p, text in zip(plain, texts, strict=True)]
    encoded: list[list[int]] = [[] for _ in texts]
    for wanted in {*adds}:
        rows = [i for i, add in enumerate(adds) if add == wanted]
        ids = tokenizer([texts[i] for i in rows], add_special_tokens=wanted, return_attention_mask=False)
        for i, row in zip(rows, ids["input_ids"], strict=True):
            encoded[i] = row
    return encoded


def _closed(ids: list[int], closing: set[int], tokenizer: Any) -> list[int]:
    r"""Return a completion with one EOS behind it where nothing closes it: a model must learn where to stop.

    A closing token is the last one, or stands before white space: ChatML ends `<|im_end|>\n`, Gemma `<end_of_turn>\n`.
    """
    before_blank = ids[-2:-1] and ids[-2] in closing and not tokenizer.decode(ids[-1:]).strip()
    return ids if closing & {*ids[-1:]} or before_blank else [*ids, tokenizer.eos_token_id]


def _closing_ids(tokenizer: Any) -> set[int]:
    """Return the ids that close a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    closing = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return closing - ({tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id})


def _common_prefix(*rows: list[int]) -> int:
    for at, ids in enumerate(zip(*rows, strict=False)):
        if any(i != ids[0] for i in ids):
            return at
    return min(map(len, rows))


def _cut(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, bos: int | None) -> Tokens | None:
    """Cut to `max_length`: the completions keep their start, the prompt its BOS and its end.

    Completions have at least half of max_length to themselves, as far as they need it.
    """
    longest = max(len(chosen), len(rejected))
    truncated = len(prompt) + longest > max_length
    if truncated:
        prompt = _keep_end(prompt, max_length - min(longest, max_length // 2), bos)
        room = max_length - len(prompt)
        chosen, rejected = chosen[:room], rejected[:room]
    return None if chosen == rejected else Tokens(prompt, chosen, rejected, truncated)


def _keep_end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]
