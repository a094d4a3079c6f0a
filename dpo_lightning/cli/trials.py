"""A grid of trials is judged before the first one runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_lightning.config import check
from dpo_lightning.types import UserError


def is_override(word: str) -> bool:
    """Return whether a word of the command line is a key's, and no flag of Hydra's."""
    return re.match(r"~|[^-].*=", word) is not None


def check_trials(config_name: str) -> None:
    """Raise one UserError with what is wrong with each value of the command line's grid, the others being the first."""
    problems: dict[str, None] = {}
    for trial in _trials([*filter(is_override, sys.argv[1:])]):
        try:
            check(compose(config_name, trial), trial)
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UserError("\n".join(problems))


def _trials(words: list[str]) -> Iterator[list[str]]:
    """Yield a grid's trials in which at most one key has another than its first value.

    >>> [*_trials(["a=1,2", "b=3", "c=x,y"])]
    [['a=1', 'b=3', 'c=x'], ['a=2', 'b=3', 'c=x'], ['a=1', 'b=3', 'c=x'], ['a=1', 'b=3', 'c=y']]
    """
    overrides = OverridesParser.create().parse_overrides(words)
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in overrides
    ]
    firsts = [options[0] for options in values]
    for at, options in enumerate(values):
        if len(options) > 1:
            yield from ([*firsts[:at], option, *firsts[at + 1 :]] for option in options)
