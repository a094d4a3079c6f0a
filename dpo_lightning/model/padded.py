"""The plain layout: prompt + chosen and prompt + rejected as 2B rows, padded on the right.

No mask is needed: attention is causal, so no token sees the padding behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_lightning.types import Batch


def scored_rows(trunk: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the hidden rows (S, H) that predict a completion token, and those tokens (S,).

    Ordered by pair, chosen before rejected.
    """
    device = batch.ids_T.device
    index_2BT, rows_S, tokens_S = (t.to(device, non_blocking=True) for t in plan(batch.lengths_B3))
    hidden = trunk(input_ids=batch.ids_T[index_2BT], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[rows_S], batch.ids_T[tokens_S]


def positions(lengths_B3: Tensor) -> int:
    """Return the positions of the 2B rows, padding included.

    >>> positions(torch.tensor([[2, 1, 2], [1, 1, 1]]))
    16
    """
    return 2 * len(lengths_B3) * int((lengths_B3[:, 0] + lengths_B3[:, 1:].max(1).values).max())


def plan(lengths_B3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where in ids_T each position of the 2B rows is found, the rows to score, and their targets in ids_T.

    >>> index, rows, targets = plan(torch.tensor([[2, 1, 2]]))
    >>> index.tolist(), rows.tolist(), targets.tolist()
    ([[0, 1, 2, 2], [0, 1, 3, 4]], [1, 5, 6], [2, 3, 4])
    """
    starts = [0, *lengths_B3.sum(1).cumsum(0).tolist()]
    lengths = lengths_B3.tolist()
    width = max(p + max(c, r) for p, c, r in lengths)
    index, rows, targets = [], [], []
    for i, (start, (p, c, r)) in enumerate(zip(starts, lengths, strict=False)):
        for side, (first, length) in enumerate(((start + p, c), (start + p + c, r))):
            at = torch.arange(width)
            index.append(torch.where(at < p, start + at, first + (at - p).clamp(max=length - 1)))
            rows.append(torch.arange(p - 1, p - 1 + length) + (2 * i + side) * width)
            targets.append(torch.arange(first, first + length))
    return torch.stack(index), torch.cat(rows), torch.cat(targets)
