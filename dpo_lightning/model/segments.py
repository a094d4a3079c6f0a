"""Which keys each query of a packed row sees: segments, and their blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # queries of a segment at a time: bounds the scores at hand, and skips keys that lie ahead


@dataclass(frozen=True)
class Segments:
    """Which keys each query sees.

    The queries of segment i are ends_q[i]:ends_q[i+1] of the row, its keys ends_k[i]:ends_k[i+1] of row[keys_K], the
    gathered keys. Within a segment, query j sees the keys up to j + (keys - queries).
    """

    ends_q: list[int]
    ends_k: list[int]
    keys_K: Tensor
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield each segment's queries in the row and keys in the gathered keys."""
        for (a, b), (c, d) in zip(pairwise(self.ends_q), pairwise(self.ends_k), strict=True):
            yield slice(a, b), slice(c, d)

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Return which keys each query sees, bool (queries, keys); `window` is the number of keys in sight."""
        key = (queries, keys, window)
        if key not in self.masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.keys_K.device)
            seen = ones.tril(keys - queries)
            self.masks[key] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self.masks[key]

    def bias(self, block: Block, rule: ScoreRule) -> Tensor:
        """Return what is added to the scores of a block's last keys: 0 where a key is seen, else -inf."""
        queries, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
        if rule.window is None:
            keys = queries  # all see the keys before
        key = (queries, keys, rule.window, "bias")
        if key not in self.masks:
            seen = self.mask(queries, keys, rule.window)
            self.masks[key] = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
        return self.masks[key]

    @cached_property
    def longest(self) -> int:
        """Return the most keys of a segment."""
        return max(b - a for a, b in pairwise(self.ends_k))

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, int, int]:
        """Return what a variable-length call wants: ends of queries and of keys, the most of each in a segment."""
        q, k = (torch.tensor(ends, dtype=torch.int32, device=self.keys_K.device) for ends in (self.ends_q, self.ends_k))
        return q, k, max(b - a for a, b in pairwise(self.ends_q)), self.longest


class ScoreRule(NamedTuple):
    """What becomes of q k^T before the softmax: times `scale`, then `cap` tanh(s / cap), then the window."""

    scale: float
    window: int | None
    cap: float | None


class Block(NamedTuple):
    """Queries `rows` of the row and the gathered keys `keys` that at least one of them sees."""

    rows: slice
    keys: slice


def blocks(segments: Segments, window: int | None) -> Iterator[Block]:
    """Yield every segment's blocks of queries, in order."""
    for q, k in segments:
        ahead = (k.stop - k.start) - (q.stop - q.start)  # keys that the segment's first query sees besides its own
        for a in range(q.start, q.stop, BLOCK):
            b = min(a + BLOCK, q.stop)
            first = 0 if window is None else max(0, ahead + a - q.start - window + 1)
            yield Block(slice(a, b), slice(k.start + first, k.start + ahead + b - q.start))
