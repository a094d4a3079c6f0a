"""The pairs of a workload, chosen once with our own reader and written as rows that both programs read alike.

Runs as a process of its own (`python -m benchmarks.pairs JSON`): the parent must stay small, since a process
starts its life, and its maximum resident set, as a copy of the one that started it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 256  # rows that are tokenised at once


def token_digest(pairs: Iterable[Sequence[Sequence[int]]]) -> str:
    """Return a text that is the same for the same prompt, chosen and rejected ids in the same order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([list(ids) for ids in pair]).encode())
    return digest.hexdigest()[:16]


def whole_pairs(path: str, tokenizer: Any, max_length: int) -> Iterator[tuple[Any, Any] | None]:
    """Yield pairs of messages with their tokens; None for a row that holds none that fits `max_length` uncut.

    The two programs cut differently (TRL drops long prompts and cuts answers, ours shortens the prompt first), so
    that only pairs which neither touches are the same work for both.
    """
    from dpo_lightning.data.pairs import Unusable, to_pair
    from dpo_lightning.data.sources import FileSource
    from dpo_lightning.data.tokenize import tokenize_pairs

    def read(row: dict[str, Any]) -> Any:
        try:
            return to_pair(row)
        except Unusable:
            return None

    rows = (row for _, row in FileSource(path).rows())
    while batch := list(itertools.islice(rows, BATCH)):
        pairs = [read(row) for row in batch]
        tokens = iter(tokenize_pairs([pair for pair in pairs if pair], tokenizer, max_length))
        for pair in pairs:
            ids = next(tokens) if pair else None
            whole = ids is not None and not ids.truncated and not isinstance(pair.prompt, str)
            yield (pair, ids) if whole else None


def write_pairs(path: str, out: Path, wanted: int, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Write the first `wanted` whole pairs of a file as rows of messages, from the first again where they run out.

    Returns how many were found and left out, the three lengths of each row written, and the digest of their tokens.
    """
    found, left_out = [], 0
    for pair in whole_pairs(path, tokenizer, max_length):
        if pair is None:
            left_out += 1
            continue
        found.append(pair)
        if len(found) == wanted:
            break
    if not found:
        raise ValueError(f"{Path(path).name}: no pair of messages within {max_length} tokens")
    chosen = list(itertools.islice(itertools.cycle(found), wanted))
    out.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair, _ in chosen))
    return {
        "file": Path(path).name,
        "distinct": len(found),
        "left_out": left_out,
        "lengths": [[len(ids) for ids in tokens[:3]] for _, tokens in chosen],
        "digest": token_digest(tokens[:3] for _, tokens in chosen),
    }


def main(job: dict[str, Any]) -> None:
    """Convert the model, write the pairs, and tell of both in `job["out"]`."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from dpo_lightning.cache import cache_dir
    from dpo_lightning.config import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        source = instantiate(compose("config", job["words"]).model, cache=cache_dir() / "models")
    found = write_pairs(job["path"], Path(job["rows"]), job["wanted"], source.load_tokenizer(), job["max_length"])
    Path(job["out"]).write_text(json.dumps({"model": source.folder(), "pairs": found}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
