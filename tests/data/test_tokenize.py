"""Token ids of pairs: what is the prompt, what is learnt, and what a cut leaves."""

from __future__ import annotations

import random
from datetime import datetime
from typing import Any

import pytest

from dpo_lightning.data.tokenize import Tokens, tokenize_pairs, use_chat
from dpo_lightning.model.tiny import byte_tokenizer
from dpo_lightning.types import Message, Pair, UserError

BOS, END, PAD = 0, 1, 2
LONG = 10_000


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def plain_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str) -> Message:
    return {"role": "assistant", "content": text}


def one(pair: Pair, tokenizer: Any, max_length: int = LONG, template: str = "auto") -> Tokens:
    (tokens,) = tokenize_pairs([pair], tokenizer, max_length, template)
    assert tokens is not None
    return tokens


def texts(tokens: Tokens, tokenizer: Any) -> tuple[str, str, str]:
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in tokens[:3])
    return prompt, chosen, rejected


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_plain_text_has_one_bos_before_and_one_eos_behind(plain_tokenizer: Any) -> None:
    tokens = one(Pair("Why? ", "So.", "No!"), plain_tokenizer)
    assert texts(tokens, plain_tokenizer) == ("<|bos|>Why? ", "So.<|end|>", "No!<|end|>")
    assert (tokens.prompt.count(BOS), tokens.chosen[-1], tokens.rejected[-1]) == (1, END, END)
    assert tokens.truncated is False
    assert (len(tokens.prompt), len(tokens.chosen), len(tokens.rejected)) == (6, 4, 4)


def test_text_becomes_a_chat_where_the_tokenizer_has_a_template(tokenizer: Any) -> None:
    expected = (
        "<|bos|><|start|>user\nWhy?<|end|><|start|>assistant\n",
        "So.<|end|>",
        "No!<|end|>",
    )
    assert texts(one(Pair("Why?", "So.", "No!"), tokenizer), tokenizer) == expected
    assert texts(one(Pair("Why?", "So.", "No!"), tokenizer, template="chat"), tokenizer) == expected
    assert texts(one(Pair([user("Why?")], [bot("So.")], [bot("No!")]), tokenizer), tokenizer) == expected
    assert texts(one(Pair([user("Why?")], [bot("So.")], [bot("No!")]), tokenizer, template="plain"), tokenizer) == (
        expected
    ), "messages stay a chat whatever is said of text rows"


def test_text_stays_plain_where_it_is_asked_for(tokenizer: Any) -> None:
    tokens = one(Pair("Why? ", "So.", "No!"), tokenizer, template="plain")
    assert texts(tokens, tokenizer) == ("<|bos|>Why? ", "So.<|end|>", "No!<|end|>")


def test_all_turns_of_a_talk_are_prompt(tokenizer: Any) -> None:
    talk = [system("Be kind."), user("Hi"), bot("Hello"), user("Why?")]
    assert texts(one(Pair(talk, [bot("So.")], [bot("No!")]), tokenizer), tokenizer) == (
        "<|bos|><|start|>system\nBe kind.<|end|><|start|>user\nHi<|end|><|start|>assistant\nHello<|end|>"
        "<|start|>user\nWhy?<|end|><|start|>assistant\n",
        "So.<|end|>",
        "No!<|end|>",
    )


def test_use_chat() -> None:
    chat, plain = byte_tokenizer(), byte_tokenizer()
    plain.chat_template = None
    assert [use_chat(chat, t) for t in ("auto", "chat", "plain")] == [True, True, False]
    assert [use_chat(plain, t) for t in ("auto", "plain")] == [False, False]
    with pytest.raises(UserError, match=r"data\.template=chat: .*no chat template; use data\.template=plain"):
        use_chat(plain, "chat")


def test_what_a_tokenizer_lacks_is_said_with_the_remedy(plain_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"use data.template=plain"):
        one(Pair("Q", "a", "b"), plain_tokenizer, template="chat")
    with pytest.raises(UserError, match=r"data are messages but .*no chat template: give model.tokenizer="):
        one(Pair([user("Q")], [bot("a")], [bot("b")]), plain_tokenizer)
    plain_tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token.* give model.tokenizer="):
        one(Pair("Q", "a", "b"), plain_tokenizer)


def test_a_template_without_an_end_token_gets_one_eos(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens = one(Pair("Why?", "So.", "No!"), tokenizer)
    assert texts(tokens, tokenizer) == ("user: Why?\nassistant: ", "So.\n<|end|>", "No!\n<|end|>")


def test_an_end_token_with_a_line_break_behind_is_the_end(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>\n")  # ChatML's and Gemma's form
    tokens = one(Pair("Why?", "So.", "No!"), tokenizer)
    assert texts(tokens, tokenizer)[1:] == ("So.<|end|>\n", "No!<|end|>\n")


def test_an_end_token_that_text_goes_on_behind_is_no_end(tokenizer: Any) -> None:
    tokens = one(Pair("Why? ", "<|end|>.", "<|end|>"), tokenizer, template="plain")
    assert texts(tokens, tokenizer)[1:] == ("<|end|>.<|end|>", "<|end|>")


def test_an_end_of_turn_that_is_not_the_eos_is_the_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|pad|>"  # Llama 3: turns end with <|eot_id|>, texts with <|end_of_text|>
    tokens = one(Pair("Why?", "So.", "No!"), tokenizer)
    assert texts(tokens, tokenizer)[1:] == ("So.<|end|>", "No!<|end|>")
    assert texts(one(Pair("Why?", "So.", "No!"), tokenizer, template="plain"), tokenizer)[1:] == (
        "So.<|pad|>",
        "No!<|pad|>",
    )


def test_a_tokenizer_that_adds_its_own_eos_is_not_given_a_second(plain_tokenizer: Any) -> None:
    from tokenizers import processors

    plain_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", BOS), ("<|end|>", END)]
    )
    tokens = one(Pair("Why? ", "So.", "No!"), plain_tokenizer)
    assert texts(tokens, plain_tokenizer) == ("<|bos|>Why? ", "So.<|end|>", "No!<|end|>")


def test_text_that_begins_with_bos_is_not_given_a_second(plain_tokenizer: Any) -> None:
    pairs = [Pair("<|bos|>Why? ", "So.", "No!"), Pair("Why? ", "So.", "No!")]
    marked, unmarked = tokenize_pairs(pairs, plain_tokenizer, LONG)
    assert marked == unmarked
    assert marked is not None and marked.prompt.count(BOS) == 1


def test_a_tokenizer_without_bos_adds_none(plain_tokenizer: Any) -> None:
    from tokenizers import processors

    plain_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    plain_tokenizer.bos_token = None
    assert texts(one(Pair("Why? ", "So.", "No!"), plain_tokenizer), plain_tokenizer) == (
        "Why? ",
        "So.<|end|>",
        "No!<|end|>",
    )
    assert texts(one(Pair("", "So.", "No!"), plain_tokenizer), plain_tokenizer)[0] == "<|end|>", (
        "the first token of a completion must be predicted from something"
    )


def test_the_prompt_is_what_all_three_have_in_common() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_tokens(["? S", "? N"])  # merges across the end of the prompt
    tokens = one(Pair("Why? ", "So.", "No!"), tokenizer)
    assert texts(tokens, tokenizer) == ("<|bos|>Why", "? So.<|end|>", "? No!<|end|>")
    tokens = one(Pair("Why? ", "So.", "no"), tokenizer)  # only one side merges: its prompt is the shorter one
    assert texts(tokens, tokenizer) == ("<|bos|>Why", "? So.<|end|>", "? no<|end|>")
    tokens = one(Pair("Why? ", "so", "No!"), tokenizer)
    assert texts(tokens, tokenizer) == ("<|bos|>Why", "? so<|end|>", "? No!<|end|>")


def test_completions_that_open_alike_keep_their_opening(plain_tokenizer: Any) -> None:
    tokens = one(Pair("Why? ", "It is so.", "It is not."), plain_tokenizer)
    assert texts(tokens, plain_tokenizer) == ("<|bos|>Why? ", "It is so.<|end|>", "It is not.<|end|>")
    tokens = one(Pair("Why? ", "Yes", "Yes, sir"), plain_tokenizer)
    assert texts(tokens, plain_tokenizer) == ("<|bos|>Why? ", "Yes<|end|>", "Yes, sir<|end|>")


LLAMA = (  # the opening of Llama 3.2's template
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}"
)


MACRO = "{% macro opening() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ opening() }}"  # as GPT-OSS asks for it


@pytest.mark.parametrize("date", [LLAMA, MACRO])
def test_the_day_is_not_in_the_data(date: str, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + date + "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    assert texts(one(Pair("Why?", "So.", "No!"), tokenizer), tokenizer)[0] == "<|bos|>26 Jul 2024Why?<|end|>"


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%B %d, %Y", "%A, %d %b %y", "%a %H:%M:%S"])
def test_the_fixed_day_is_written_as_the_template_wants_it(form: str, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "\n {{ strftime_now('" + form + "') }}|{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    told = datetime(2024, 7, 26, 12).strftime(form)
    assert texts(one(Pair("Why?", "So.", "No!"), tokenizer), tokenizer)[0] == f"\n {told}|Why?"


def gemma(tokenizer: Any) -> Any:
    """Give a tokenizer the rules of Gemma's template: no system role, user and assistant by turns."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_a_system_turn_the_template_refuses_goes_into_the_first_user_turn(tokenizer: Any) -> None:
    pair = Pair([system("Be kind."), user("Hi"), bot("Yes?"), user("Why?")], [bot("So.")], [bot("No!")])
    assert texts(one(pair, gemma(tokenizer)), tokenizer) == (
        "<|bos|><|start|>user\nBe kind.\n\nHi<|end|>\n<|start|>assistant\nYes?<|end|>\n"
        "<|start|>user\nWhy?<|end|>\n<|start|>assistant\n",
        "So.<|end|>\n",
        "No!<|end|>\n",
    )
    assert pair.prompt[0] == {"role": "system", "content": "Be kind."}, "the pair itself was altered"


def test_two_turns_of_one_role_that_the_template_refuses_are_joined(tokenizer: Any) -> None:
    talk = [user("Hi"), bot("Yes?"), bot("Hello?"), user("Why?")]  # 2 of 1000 rows of Anthropic HH are such
    assert texts(one(Pair(talk, [bot("So.")], [bot("No!")]), gemma(tokenizer)), tokenizer)[0] == (
        "<|bos|><|start|>user\nHi<|end|>\n<|start|>assistant\nYes?\n\nHello?<|end|>\n"
        "<|start|>user\nWhy?<|end|>\n<|start|>assistant\n"
    )


def test_of_an_answer_that_was_begun_the_three_texts_are_rendered_alike(tokenizer: Any) -> None:
    """The prompt alone is no two turns of one role, with the completion it is: both are joined, or neither."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if not loop.first and m['role'] == messages[loop.index0 - 1]['role'] %}"
        "{{ raise_exception('twice') }}{% endif %}<|start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m['role'] != 'assistant' or not loop.last %}<|end|>{% endif %}{% endfor %}"
    )
    pair = Pair([system("Be kind."), user("Hi"), bot("Well")], [bot("So.")], [bot("No!")])
    assert texts(one(pair, tokenizer), tokenizer) == (
        "<|bos|><|start|>system\nBe kind.<|end|><|start|>user\nHi<|end|><|start|>assistant\nWell",
        "\n\nSo.<|end|>",
        "\n\nNo!<|end|>",
    )


def test_an_unknown_token_ends_no_completion(plain_tokenizer: Any) -> None:
    plain_tokenizer.unk_token = plain_tokenizer.pad_token
    tokens = one(Pair("Why? ", f"So{plain_tokenizer.pad_token}", "No!"), plain_tokenizer)
    assert tokens.chosen[-2:] == [PAD, END]


def test_a_template_that_takes_all_roles_is_given_them_as_they_are(tokenizer: Any) -> None:
    talk = [system("S"), user("A"), user("B")]
    assert texts(one(Pair(talk, [bot("x")], [bot("y")]), tokenizer), tokenizer)[0] == (
        "<|bos|><|start|>system\nS<|end|><|start|>user\nA<|end|><|start|>user\nB<|end|><|start|>assistant\n"
    )


def test_roles_that_no_joining_mends_are_named(tokenizer: Any) -> None:
    pair = Pair([bot("Welcome"), user("Hi")], [bot("So.")], [bot("No!")])
    with pytest.raises(
        UserError, match=r"refuses the roles assistant, user, assistant .*must alternate.*remove such rows"
    ):
        one(pair, gemma(tokenizer))


def test_sides_that_are_equal_as_tokens_give_none(tokenizer: Any) -> None:
    pairs = [Pair("Q", "same start, then A", "same start, then B"), Pair("Q", "A", "B")]
    cut, kept = tokenize_pairs(pairs, tokenizer, 24, "plain")
    assert cut is not None
    assert kept is not None
    cut, kept = tokenize_pairs(pairs, tokenizer, 18, "plain")
    assert kept is not None
    assert cut is None, "max_length ends before the sides part"
    assert texts(kept, tokenizer) == ("<|bos|>Q", "A<|end|>", "B<|end|>")
    assert tokenize_pairs([Pair("Q", "A", "A\n")], gemma(tokenizer), LONG) == [None], "the template trims"


def test_the_batch_changes_nothing(tokenizer: Any) -> None:
    pairs = [
        Pair("Why? ", "So.", "No!"),
        Pair([user("Hi")], [bot("A")], [bot("B")]),
        Pair("<|bos|>Q", "yes", "yes"),
        Pair("", "x", "y" * 40),
    ]
    for template in ("chat", "plain"):
        together = tokenize_pairs(pairs, tokenizer, 30, template)
        assert together == [tokenize_pairs([pair], tokenizer, 30, template)[0] for pair in pairs]
        assert [tokens is None for tokens in together] == [False, False, True, False]


CUTS = {  # max_length: what is left of a prompt of 11 tokens and completions of 9 and 4
    20: ("<|bos|>0123456789", "abcdefgh<|end|>", "xyz<|end|>", False),
    19: ("<|bos|>123456789", "abcdefgh<|end|>", "xyz<|end|>", True),
    18: ("<|bos|>23456789", "abcdefgh<|end|>", "xyz<|end|>", True),
    16: ("<|bos|>3456789", "abcdefgh", "xyz<|end|>", True),
    9: ("<|bos|>6789", "abcd", "xyz<|end|>", True),
    8: ("<|bos|>789", "abcd", "xyz<|end|>", True),
    4: ("<|bos|>9", "ab", "xy", True),
    2: ("<|bos|>", "a", "x", True),
}


@pytest.mark.parametrize("max_length", CUTS)
def test_a_cut_keeps_bos_the_prompts_end_and_the_completions_start(plain_tokenizer: Any, max_length: int) -> None:
    tokens = one(Pair("0123456789", "abcdefgh", "xyz"), plain_tokenizer, max_length)
    assert (*texts(tokens, plain_tokenizer), tokens.truncated) == CUTS[max_length]


def test_a_short_prompt_leaves_its_room_to_the_completions(plain_tokenizer: Any) -> None:
    tokens = one(Pair("Q", "a" * 20, "b" * 30), plain_tokenizer, 12)
    assert texts(tokens, plain_tokenizer) == ("<|bos|>Q", "a" * 10, "b" * 10)


def test_a_cut_without_bos_keeps_the_prompts_end(plain_tokenizer: Any) -> None:
    from tokenizers import processors

    plain_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for bos_token in (None, "<|bos|>"):  # none at all, or one that the tokenizer does not write
        plain_tokenizer.bos_token = bos_token
        tokens = one(Pair("0123456789", "abcdefgh", "xyz"), plain_tokenizer, 8)
        assert texts(tokens, plain_tokenizer) == ("6789", "abcd", "xyz<|end|>")


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_any_pair_is_a_prompt_and_two_completions_within_max_length(template: str) -> None:
    tokenizer = byte_tokenizer()
    dice = random.Random(20)
    alphabet = "ab \nÄ中😀"
    kept = 0
    for _ in range(400):
        prompt, chosen, rejected = (
            "".join(dice.choices(alphabet, k=dice.choice((0, 1, 3, 12, 60)))) for _ in range(3)
        )  # fmt: skip
        pair, limit = Pair(prompt, chosen + "1", rejected + "2"), dice.randint(2, 200)
        whole = one(pair, tokenizer, LONG, template)
        (tokens,) = tokenize_pairs([pair], tokenizer, limit, template)
        open_, close = ("<|start|>user\n", "<|end|><|start|>assistant\n") if template == "chat" else ("", "")
        assert whole.prompt == [BOS, *ids_of(f"{open_}{prompt}{close}", tokenizer)]
        assert whole.chosen == [*ids_of(pair.chosen, tokenizer), END]  # type: ignore[arg-type]
        assert whole.rejected == [*ids_of(pair.rejected, tokenizer), END]  # type: ignore[arg-type]
        if tokens is None:
            assert whole.chosen[: limit // 2] == whole.rejected[: limit // 2]
            continue
        kept += 1
        fits = len(whole.prompt) + max(len(whole.chosen), len(whole.rejected)) <= limit
        assert tokens.truncated is not fits
        assert tokens[:3] == whole[:3] or not fits
        assert len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected)) <= limit
        assert tokens.prompt[0] == BOS
        assert whole.prompt[1:][-len(tokens.prompt[1:]) or len(whole.prompt) :] == tokens.prompt[1:]
        for side, uncut in ((tokens.chosen, whole.chosen), (tokens.rejected, whole.rejected)):
            assert side == uncut[: len(side)]
            assert len(side) >= min(len(uncut), limit // 2) >= 1
        assert tokens.chosen != tokens.rejected
    assert kept > 200
