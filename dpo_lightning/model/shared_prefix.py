"""The compact layout: prompt | chosen | rejected of every pair in one row, each prompt once, no padding.

What all prompts of a batch open with (a chat template's system turn) stands once for all of them, before the pairs.
All of the trunk but attention works token by token, so it needs no change. Attention is un-shared: a pair becomes
two segments, queries [prompt chosen] with keys [opening prompt chosen], and queries [rejected] with keys [opening
prompt rejected], both causal with their ends aligned. Queries stay where they are; keys and values are gathered.
The idea is https://arxiv.org/abs/2410.20305's, in a form that needs no special attention kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_lightning.model import last_mlp
from dpo_lightning.model.segments import Segments
from dpo_lightning.types import Batch


class Plan(NamedTuple):
    """The row of T tokens, as places in Batch.ids_T, and what is read from it."""

    tokens_T: Tensor  # which of the batch's tokens stand in the row
    positions_T: Tensor  # of each of them in its own sequence
    rows_S: Tensor  # places in the row that predict a completion token
    targets_S: Tensor  # those tokens' places in the batch
    read_R: Tensor  # rows_S, each once and in order
    segments: Segments


def scored_rows(trunk: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the hidden rows (S, H) that predict a completion token, and those tokens (S,).

    Ordered by pair, chosen before rejected. The prompt's last row predicts both first tokens.
    """
    row = plan(batch.lengths_B3, batch.opening, batch.ids_T.device)
    last_mlp.install(trunk)
    hidden = trunk(
        input_ids=batch.ids_T[row.tokens_T][None], position_ids=row.positions_T[None], use_cache=False,
        segments=row.segments, read_R=row.read_R,
    ).last_hidden_state  # fmt: skip
    return hidden[0][row.rows_S], batch.ids_T[row.targets_S]


def plan(lengths_B3: Tensor, opening: int, device: torch.device) -> Plan:
    """Lay out pairs of these lengths, whose prompts have their first `opening` tokens in common.

    >>> row = plan(torch.tensor([[2, 1, 2], [2, 1, 1]]), 1, torch.device("cpu"))
    >>> row.tokens_T.tolist(), row.positions_T.tolist()
    ([0, 1, 2, 3, 4, 6, 7, 8], [0, 1, 2, 2, 3, 1, 2, 2])
    >>> row.rows_S.tolist(), row.targets_S.tolist()
    ([1, 1, 3, 5, 5], [2, 3, 4, 7, 8])
    >>> row.read_R.tolist()
    [1, 3, 5]
    >>> row.segments.ends_q, row.segments.ends_k, row.segments.keys_K.tolist()
    ([0, 1, 3, 5, 7, 8], [0, 1, 4, 8, 11, 14], [0, 0, 1, 2, 0, 1, 3, 4, 0, 5, 6, 0, 5, 7])
    """
    shared = torch.arange(opening)
    tokens, positions, rows, targets, read, keys = [shared], [shared], [], [], [], [shared]
    ends_q, ends_k = ([0, opening], [0, opening]) if opening else ([0], [0])
    source, start = 0, opening
    for p, c, r in lengths_B3.tolist():
        chosen = start + p - opening
        rejected, end = chosen + c, chosen + c + r
        tokens.append(torch.arange(source + opening, source + p + c + r))
        positions += [torch.arange(opening, p + c), torch.arange(p, p + r)]
        rest = torch.arange(rejected, end - 1)
        read += [torch.arange(chosen - 1, rejected - 1), rest]
        rows += [read[-2], torch.tensor([chosen - 1]), rest]
        targets.append(torch.arange(source + p, source + p + c + r))
        keys += [shared, torch.arange(start, rejected), shared]
        keys += [torch.arange(start, chosen), torch.arange(rejected, end)]
        ends_q += [rejected, end]
        ends_k += [ends_k[-1] + p + c, ends_k[-1] + p + c + p + r]
        source, start = source + p + c + r, end
    tokens_T, positions_T, rows_S, targets_S, read_R, keys_K = (
        torch.cat(parts).to(device, non_blocking=True) for parts in (tokens, positions, rows, targets, read, keys)
    )
    return Plan(tokens_T, positions_T, rows_S, targets_S, read_R, Segments(ends_q, ends_k, keys_K))
