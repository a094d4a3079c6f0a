"""No configuration may hold a secret: it is written to disk, into checkpoints and to W&B.

Asked twice: of the command line before Hydra reads it, since Hydra repeats what it cannot parse, and of what Hydra has
composed, since YAML files and the environment may have brought one in. What is refused is never repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# max_new_tokens, tokenizer and pad_token_id are no secrets
NAMES = re.compile(r"token(?![a-z_])|secret|passw(or)?d|passphrase|credential|(api|access|private)[-_]?key", re.I)
VALUES = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    "an AWS key": re.compile(r"(?<![A-Za-z0-9])AKIA[A-Z0-9]{16}"),
    "an API key": re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}"),
    # standing alone: in a path, or behind an @, it is a commit
    "40 hex digits, as W&B's keys are": re.compile(r"(?<![\w./@-])[0-9a-f]{40}(?![\w./-])"),
}
GIVEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST = 20  # characters of a real one
REMEDY = "set HF_TOKEN or WANDB_API_KEY in the environment, or log in with `hf auth login` or `wandb login`"
BY_NAME = f"no key may hold a secret, as the configuration is written to disk; {REMEDY}"
BY_VALUE = "holds {}, which would be written to disk; " + REMEDY


def kind_of(text: str) -> str | None:
    """Return what secret a text holds, in words, or None."""
    for name in GIVEN:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST and value in text:
            return f"${name}"
    return next((kind for kind, pattern in VALUES.items() if pattern.search(text)), None)


def without_passwords(text: str) -> str:
    """Return a text to be shown without what stands before the host in its addresses.

    >>> without_passwords("https://me:word@mirror:8080/x does not answer")
    'https://mirror:8080/x does not answer'
    """
    return re.sub(r"(?<=://)[^/\s?#]*@", "", text)


def in_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """Tell of command line arguments that hold a secret, or set a key that is named like one."""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        key = name.lstrip("+~")
        place = key if equals and not kind_of(key) else "an argument"
        if kind := kind_of(argument):
            yield f"{place}: {BY_VALUE.format(kind)}"
        elif equals and NAMES.search(key):
            yield f"{place}: {BY_NAME}"


def in_config(cfg: DictConfig) -> Iterator[str]:
    """Tell of keys of a composed configuration that hold a secret, or are named like one."""
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        if kind := kind_of(_resolved(cfg, key, value)):
            yield f"{'a key' if kind_of(key) else key}: {BY_VALUE.format(kind)}"
        elif NAMES.search(key):
            yield f"{key}: {BY_NAME}"


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of all that is no mapping and no list."""
    if not isinstance(node, dict | list):
        yield name, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _resolved(cfg: DictConfig, key: str, value: Any) -> str:
    """Return a value as text, with what its interpolations stand for where that is known already."""
    if not (isinstance(value, str) and "${" in value):
        return str(value)
    try:
        return f"{value} {OmegaConf.select(cfg, key)}"
    except OmegaConfBaseException:  # told later, by `check`; or it stands for what is not yet there
        return value
