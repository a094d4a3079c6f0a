"""A source of rows becomes a memory-mapped table of token ids, once: `datasets` keeps it under a content key.

Rows stream through in batches, and the table is read from disk as it is needed: memory grows by some numbers a pair,
not by its text or tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.cache import cache_dir, locked, refused, writes_cache
from dpo_lightning.data.pairs import Unusable, to_pair
from dpo_lightning.data.sources import Source
from dpo_lightning.data.tokenize import tokenize_pairs
from dpo_lightning.types import Pair, UserError

VERSION = 8  # part of the key: raise it when the same rows would give other ids
TOKENIZER_BATCH = 1000
SIDES = ("prompt", "chosen", "rejected")
SHOWN = 5  # bad rows that are named before the rest is counted


@dataclass
class Census:
    """What became of the rows: how many were used, and why the others were not."""

    rows: int = 0
    pairs: int = 0
    truncated: int = 0
    conversations: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count a row that holds no preference."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def prepare(
    source: Source, tokenizer: Any, max_length: int, template: str, max_pairs: int | None
) -> tuple[Any, Census]:
    """Return the table and the census of the rows it was made of.

    Columns: prompt, chosen, rejected, lists of int32; lengths, their three lengths; key, 16 bytes that change with
    any token; prompt_key, int64; question, text.

    The rows must have passed `validate`. A table that cannot be read is made anew. Raises UserError if the template
    refuses a row, nothing is left of any, or the cache cannot be written.
    """
    settings = [VERSION, source.digest(), tokenizer_digest(tokenizer), max_length, template, max_pairs]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    folder = cache_dir() / "data"
    job = _Job(source, tokenizer, max_length, template, max_pairs, folder / f"{key}.json")
    with writes_cache(), locked(folder / f"{key}.lock"):
        try:
            return _table(job, key)
        except (OSError, ValueError, TypeError, LookupError) as error:  # of Arrow's, of JSON's
            damaged = [*folder.glob(f"generator/*{key}")]
            if isinstance(error, UserError) or refused(error) or not damaged:
                raise
            print(f"warning: {damaged[0]} cannot be read ({_line(error)}): the rows are tokenised again", flush=True)
            for table in damaged:
                shutil.rmtree(table)
            return _table(job, key)


def _table(job: _Job, key: str) -> tuple[Any, Census]:
    """Return what lies under a key, made now if nothing does."""
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    ids = List(Value("int32"))
    columns = {
        **dict.fromkeys((*SIDES, "lengths"), ids),
        "key": Value("binary"),
        "prompt_key": Value("int64"),
        "question": Value("string"),
    }
    try:
        table = Dataset.from_generator(
            _tokenized,
            features=Features(columns),
            cache_dir=str(job.census_file.parent),
            gen_kwargs={"job": job},
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if (by_disk := refused(error)) is not None:
            raise by_disk from None
        raise
    census = Census(**json.loads(job.census_file.read_text()))
    if len(table) != census.pairs:
        raise ValueError(f"{len(table)} of {census.pairs} pairs")
    return table, census


def validate(source: Source) -> None:
    """Read every row; raise one UserError that names the first bad ones and counts the rest.

    Rows that have passed once are not read again as long as they do not change.
    """
    passed = cache_dir() / "data" / f"valid-{VERSION}-{hashlib.sha256(source.digest().encode()).hexdigest()[:32]}"
    with writes_cache():
        if passed.exists():
            return
    census, bad = Census(), []
    for place, row in source.rows():
        census.rows += 1
        try:
            to_pair(row)
            census.pairs += 1
        except Unusable as reason:
            census.skip(str(reason))
        except UserError as error:
            bad.append(f"{place}: {error}")
    if bad:
        more = [f"... and {len(bad) - SHOWN} more bad rows"] if len(bad) > SHOWN else []
        raise UserError("\n".join([*bad[:SHOWN], *more]))
    if not census.pairs:
        why = ", ".join(f"{n} {reason}" for reason, n in census.skipped.items()) or "it has no rows"
        raise UserError(f"{source.name}: no usable pair ({why}); give rows with a prompt and two different answers")
    with writes_cache():
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@dataclass
class _Job:
    source: Source
    tokenizer: Any
    max_length: int
    template: str
    max_pairs: int | None
    census_file: Path


def _tokenized(job: _Job) -> Iterator[dict[str, Any]]:
    census = Census()
    usable = itertools.islice(_usable(job.source, census), job.max_pairs)
    while batch := list(itertools.islice(usable, TOKENIZER_BATCH)):
        places, pairs = zip(*batch, strict=True)
        tokenized = tokenize_pairs(pairs, job.tokenizer, job.max_length, job.template, places)
        for pair, tokens in zip(pairs, tokenized, strict=True):
            if tokens is None:
                census.skip("equal as tokens")
                continue
            census.pairs += 1
            census.truncated += tokens.truncated
            census.conversations += not isinstance(pair.prompt, str)
            ids = {side: np.array(ids, np.int32) for side, ids in zip(SIDES, tokens[:3], strict=True)}
            lengths = [len(row) for row in tokens[:3]]
            yield {
                **ids, "lengths": lengths, "key": _token_key(ids.values()), "prompt_key": _prompt_key(pair),
                "question": _question(pair),
            }  # fmt: skip
    if not census.pairs:
        raise UserError(f"{job.source.name}: no usable pair {_cause(job, census)}")
    scratch = job.census_file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(vars(census)))
    scratch.replace(job.census_file)


def _cause(job: _Job, census: Census) -> str:
    """Return why nothing is left of pairs that hold a preference, and what helps."""
    _, pair = next(_usable(job.source, Census()))
    if tokenize_pairs([pair], job.tokenizer, sys.maxsize, job.template) == [None]:
        return (
            f"({most_common(census)}): the tokenizer or its chat template writes the same for both answers; give "
            "model.tokenizer= another one, or data.template=plain for text"
        )
    return f"within data.max_length={job.max_length} ({most_common(census)}); raise it"


def _usable(source: Source, census: Census) -> Iterator[tuple[str, Pair]]:
    for place, row in source.rows():
        census.rows += 1
        try:
            yield place, to_pair(row)
        except Unusable as reason:
            census.skip(str(reason))


def _token_key(sides: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in sides:
        digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.digest()


def _prompt_key(pair: Pair) -> int:
    text = json.dumps(pair.prompt, ensure_ascii=True, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _question(pair: Pair) -> str:
    """Return what the user asked last, for people to read."""
    return pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a text that changes with anything that changes the ids a tokenizer gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [model, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def split(prompt_keys: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers for training and for validation, in order; no prompt is in both.

    Prompts are taken in the order of their hashes, so that the same ones are held out whatever the file's order, and
    each with all its rows: one with more rows than are still wanted stays in training. Where every prompt has more,
    one of the fewest rows is held out. A share of 0 holds out nothing.
    """
    if not val_fraction:
        return np.arange(len(prompt_keys)), np.arange(0)
    prompts, first = np.unique(prompt_keys, return_inverse=True)
    if len(prompts) < 2:
        raise UserError(
            "one prompt alone cannot be split for validation; add rows, give data.val_path=FILE, or train without: "
            "data.val_fraction=0"
        )
    rows_of = np.bincount(first)
    left = min(max(1, round(len(prompt_keys) * val_fraction)), len(prompt_keys) - 1)
    held_out = np.zeros(len(prompts), bool)
    held_out[rows_of.argmin()] = rows_of.min() > left
    for prompt, rows in enumerate(rows_of.tolist()):
        if rows <= left:
            held_out[prompt] = True
            left -= rows
    in_val = held_out[first]
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def most_common(census: Census) -> str:
    """Return the reasons for skipped rows, most frequent first, as text."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(census.skipped).most_common())


def left_out(census: Census) -> str:
    """Return how many rows were left out and why, to be told behind a name; nothing where all were used."""
    count = sum(census.skipped.values())
    return f"; {count} of {census.rows} rows left out: {most_common(census)}" if count else ""
