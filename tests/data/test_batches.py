"""Which pairs a step, a rank and a forward pass take."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from dpo_lightning.data.batches import MicroBatch, PairTable, TrainingOrder, ValidationOrder, collate

PAIRS: list[dict[str, Any]] = [
    {"prompt": [10, 11], "chosen": [20], "rejected": [30, 31, 32], "question": "not a token"},
    {"prompt": [12], "chosen": [21, 22], "rejected": [33]},
    {"prompt": [13, 14, 15], "chosen": [23], "rejected": [34]},
]


def test_collate_lays_pairs_end_to_end() -> None:
    batch = collate(PAIRS[:2], MicroBatch((7, 3), 5))
    assert batch.ids_T.tolist() == [10, 11, 20, 30, 31, 32, 12, 21, 22, 33]
    assert batch.lengths_B3.tolist() == [[2, 1, 3], [1, 2, 1]]
    assert batch.rows_B.tolist() == [7, 3]
    assert (batch.step_pairs, len(batch)) == (5, 2)
    assert {batch.ids_T.dtype, batch.lengths_B3.dtype, batch.rows_B.dtype} == {torch.int64}


def test_collate_takes_what_the_table_gives() -> None:
    arrays: list[Any] = [
        {key: np.array(ids, np.int32) for key, ids in pair.items() if key != "question"} for pair in PAIRS
    ]
    batch, same = collate(arrays, MicroBatch((0, 1, 2), 3)), collate(PAIRS, MicroBatch((0, 1, 2), 3))
    assert batch.ids_T.tolist() == same.ids_T.tolist()
    assert batch.ids_T.dtype == torch.int64


def test_a_table_gives_the_rows_it_is_asked_for() -> None:
    table = PairTable(PAIRS)
    batch = table[MicroBatch((2, 0), 8)]
    assert batch.ids_T.tolist() == [13, 14, 15, 23, 34, 10, 11, 20, 30, 31, 32]
    assert (batch.rows_B.tolist(), batch.step_pairs, len(table)) == ([2, 0], 8, 3)


def order(pairs: int, batch: int = 2, accumulate: int = 1, seed: int = 0, **rest: Any) -> TrainingOrder:
    tokens = np.array(rest.pop("tokens", [10] * pairs))
    return TrainingOrder(tokens, batch, accumulate, seed, rest.pop("shuffle", True), **rest)


def rows(micros: Iterable[MicroBatch]) -> list[int]:
    """Return the rows that count."""
    return [row for micro in micros if micro.counted for row in micro.rows]


def steps(pairs: int, batch: int, accumulate: int, world: int, seed: int = 0) -> list[list[int]]:
    """Return the sorted rows of every optimizer step, over all ranks."""
    ranks = [list(order(pairs, batch, accumulate, seed, rank=rank, world=world)) for rank in range(world)]
    assert len({len(micros) for micros in ranks}) == 1, "ranks differ in their number of forward passes"
    starts = range(0, len(ranks[0]), accumulate)
    return [sorted(row for micros in ranks for row in rows(micros[at : at + accumulate])) for at in starts]


def test_the_order_literally() -> None:
    assert list(order(7, batch=2, accumulate=2, shuffle=False)) == [
        MicroBatch((0, 2), 4),
        MicroBatch((1, 3), 4),
        MicroBatch((4, 6), 3),
        MicroBatch((5,), 3),
    ]
    assert [list(order(9, batch=2, accumulate=2, shuffle=False, rank=rank, world=2)) for rank in (0, 1)] == [
        [MicroBatch((0, 4), 8), MicroBatch((2, 6), 8), MicroBatch((8,), 1), MicroBatch((8,), 1, counted=False)],
        [MicroBatch((1, 5), 8), MicroBatch((3, 7), 8), *[MicroBatch((8,), 1, counted=False)] * 2],
    ]
    assert rows(order(7, batch=3)) == np.random.default_rng([0, 0]).permutation(7).tolist()


def test_an_epoch_has_every_pair_once_and_its_steps_know_their_size() -> None:
    dice = random.Random(5)
    for _ in range(200):
        pairs, batch, accumulate = dice.randint(1, 50), dice.randint(1, 5), dice.randint(1, 4)
        one = order(pairs, batch, accumulate, seed=dice.randint(0, 9), shuffle=dice.random() < 0.8)
        micros = list(one)
        assert sorted(rows(micros)) == list(range(pairs))
        assert len(one) == len(micros)
        size = batch * accumulate
        assert all(1 <= len(micro.rows) <= batch for micro in micros)
        for at in range(0, len(micros), accumulate):
            step = micros[at : at + accumulate]
            real = len(rows(step))
            assert {micro.step_pairs for micro in step} == {real}
            assert real == size or at + accumulate >= len(micros), "only the last step may be a partial one"
            assert len(step) == accumulate, "DeepSpeed counts forward passes, not epochs"
        assert len(range(0, len(micros), accumulate)) == -(-pairs // size)


@pytest.mark.parametrize("pairs", [48, 50, 53])
def test_a_step_is_the_same_set_of_pairs_however_it_is_dealt_out(pairs: int) -> None:
    expected = steps(pairs, 8, 1, 1)
    assert [len(step) for step in expected] == [8] * 6 + [pairs - 48] * (pairs > 48)
    for batch, accumulate in ((1, 8), (2, 4), (4, 2)):
        assert steps(pairs, batch, accumulate, 1) == expected
    for world in (2, 4):
        for batch, accumulate in ((8 // world, 1), (1, 8 // world)):
            assert steps(pairs, batch, accumulate, world) == expected
    assert steps(pairs, 8, 1, 1, seed=1) != expected


def test_ranks_share_nothing() -> None:
    dice = random.Random(6)
    for _ in range(100):
        pairs, batch, accumulate, world = (dice.randint(1, n) for n in (60, 4, 3, 4))
        ranks = [order(pairs, batch, accumulate, rank=rank, world=world) for rank in range(world)]
        seen = Counter(row for rank in ranks for row in rows(rank))
        size = batch * accumulate * world
        assert seen == Counter(range(pairs))
        assert {len(rank) for rank in ranks} == {len(list(rank)) for rank in ranks} == {-(-pairs // size) * accumulate}
        assert {micro.step_pairs for rank in ranks for micro in rank} <= {size, pairs % size}


def test_ranks_get_like_numbers_of_tokens() -> None:
    dice = random.Random(7)
    tokens = [int(100 * dice.lognormvariate(0, 0.8)) + 10 for _ in range(512)]
    spread: dict[bool, list[float]] = {True: [], False: []}
    for balanced, found in spread.items():
        ranks = [order(512, 4, 2, tokens=tokens if balanced else [1] * 512, rank=rank, world=4) for rank in range(4)]
        for micros in zip(*ranks, strict=True):
            loads = [sum(tokens[row] for row in micro.rows) for micro in micros]
            found.append(max(loads) / (sum(loads) / len(loads)))
    assert np.mean(spread[True]) < 1.15, "the slowest rank against the mean"
    assert np.mean(spread[False]) > 1.3


def test_a_step_is_dealt_alike_to_one_rank_and_to_several() -> None:
    """The forward passes are the same ones: 1 rank that accumulates 4 has those of 4 ranks, and of 2 by 2."""
    tokens = np.random.default_rng(3).integers(10, 500, 53)
    dealt = []
    for world in (1, 2, 4):
        ranks = [list(order(53, 2, 4 // world, tokens=tokens, rank=rank, world=world)) for rank in range(world)]
        dealt.append([micro for turn in zip(*ranks, strict=True) for micro in turn])
    assert dealt[0] == dealt[1] == dealt[2]


def test_the_order_is_a_matter_of_seed_and_epoch_alone() -> None:
    one, same, other = order(30, seed=4), order(30, seed=4), order(30, seed=5)
    first = rows(one)
    assert rows(one) == rows(same) == first, "iterating changes the order"
    assert rows(other) != first
    assert first != list(range(30))
    epochs = []
    for epoch in range(4):
        one.set_epoch(epoch)
        epochs.append(rows(one))
    assert epochs[0] == first
    assert len({*map(tuple, epochs)}) == 4
    same.set_epoch(2)
    assert rows(same) == epochs[2]
    other.set_epoch(3)  # seed 5 in epoch 3 must not be seed 4 in epoch 4 or the like
    one.set_epoch(4)
    assert rows(other) != rows(one)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    first = rows(order(20))
    after = np.random.random(), torch.rand(1).item(), random.random()
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    assert after == (np.random.random(), torch.rand(1).item(), random.random())
    assert rows(order(20)) == first


def test_unshuffled_pairs_come_in_the_files_order_in_every_epoch() -> None:
    one = order(10, batch=3, shuffle=False)
    one.set_epoch(3)
    assert rows(one) == list(range(10))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("seen", [0, 8, 16, 24, 40, 46, 48])
def test_pairs_that_were_seen_are_skipped_and_the_rest_is_as_it_would_have_been(world: int, seen: int) -> None:
    for rank in range(world):
        one = order(46, 2, 4 // world, seed=3, rank=rank, world=world)
        one.set_epoch(1)
        whole = list(one)
        one.skip = (1, seen)
        done = -(-seen // 8) * (4 // world)  # steps of 8, 4 // world forward passes each
        assert list(one) == whole[done:]
        assert len(one) == len(whole), "the length is the epoch's, as Lightning counts"
        one.set_epoch(2)
        assert len(list(one)) == len(whole), "another epoch is not cut"


def test_a_resumed_run_may_deal_the_rest_out_in_another_way() -> None:
    plan = rows(order(40, batch=4, accumulate=2, seed=9))
    resumed = order(40, batch=2, accumulate=8, seed=9)
    resumed.skip = (0, 24)
    assert sorted(rows(resumed)) == sorted(plan[24:])
    assert [micro.step_pairs for micro in resumed] == [16] * 8


def test_validation_takes_each_pair_once_neighbours_of_like_length() -> None:
    dice = random.Random(8)
    for _ in range(100):
        lengths = np.array([dice.randint(1, 30) for _ in range(dice.randint(1, 40))])
        batch, world = dice.randint(1, 5), dice.choice((1, 2, 4))
        ranks = [ValidationOrder(lengths, batch, rank, world) for rank in range(world)]
        assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
        assert sorted(row for rank in ranks for row in rows(rank)) == list(range(len(lengths)))
        assert {micro.step_pairs for rank in ranks for micro in rank} == {len(lengths)}
        assert len({len(rank) for rank in ranks}) == 1, "sharded ranks run in lock-step"
        dealt = [micro for turn in zip(*ranks, strict=True) for micro in turn]
        alike = sorted(sorted(int(lengths[row]) for row in micro.rows) for micro in dealt if micro.counted)
        assert [length for batch in alike for length in batch] == sorted(lengths.tolist())
        counted = [micro.counted for micro in dealt]
        assert counted == sorted(counted, reverse=True)
        assert counted.count(False) < world


def test_validation_cut_short_is_a_fair_sample() -> None:
    """The first batches are no shorter than the rest, and the same for one rank as for several."""
    lengths = np.random.default_rng(4).lognormal(5, 0.8, 1000).astype(int)
    whole = list(ValidationOrder(lengths, 4))
    some = [int(lengths[row]) for micro in whole[:50] for row in micro.rows]
    assert np.mean(some) == pytest.approx(lengths.mean(), rel=0.15)
    assert min(some) < np.quantile(lengths, 0.1) and max(some) > np.quantile(lengths, 0.9)
    assert list(ValidationOrder(lengths, 4)) == whole
    ranks = [list(ValidationOrder(lengths, 4, rank, 2)) for rank in range(2)]
    assert [micro for turn in zip(*ranks, strict=True) for micro in turn] == whole


def test_validation_literally() -> None:
    lengths = np.array([5, 1, 5, 3, 2])
    assert list(ValidationOrder(lengths, 2)) == [MicroBatch((2,), 5), MicroBatch((1, 4), 5), MicroBatch((3, 0), 5)]
    assert list(ValidationOrder(lengths, 2, rank=1, world=2)) == [MicroBatch((1, 4), 5), MicroBatch((2,), 5, False)]
    assert list(ValidationOrder(lengths, 8, rank=1, world=2)) == [MicroBatch((1, 4, 3, 0, 2), 5, False)]
