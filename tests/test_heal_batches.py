"""Micro-batches of a training: little padding, every sample once, the same in any processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from isingcut.healing.training.batches import Steps, divisions

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(20, 400, 64)]


def order(rank: int = 0, size: int = 1, most: int = 1024, steps: int = 16) -> Steps:
    return Steps(LENGTHS, 8, steps, rank, size, 3, most).divide()


def padded(rows: list[int]) -> int:
    return len(rows) * max(LENGTHS[i] for i in rows)


def test_parts_have_the_least_padding() -> None:
    lengths = [9, 8, 7, 3, 2, 1]
    for count, (cost, found) in enumerate(divisions(lengths, 6, 99), 1):
        ways = itertools.combinations(range(1, 6), count - 1)
        edges = [[0, *way, 6] for way in ways]
        least = min(sum(lengths[a] * (b - a) for a, b in itertools.pairwise(e)) for e in edges)
        assert sum(lengths[p.start] * (p.stop - p.start) for p in found) == least
        assert cost == pytest.approx(least, rel=1e-3)
        assert [i for p in found for i in range(p.start, p.stop)] == list(range(6))


def test_parts_that_are_too_large_are_none() -> None:
    costs = [cost for cost, _ in divisions([5] * 8, 4, 15)]
    assert np.isinf(costs[:2]).all()
    assert np.isfinite(costs[2:]).all()
    # A sample that is too long by itself is a part of its own.
    *_, (cost, found) = divisions([40, 5, 5], 2, 15)
    assert found == [slice(0, 1), slice(1, 3)]
    assert np.isfinite(cost)


def test_every_sample_is_read_once_an_epoch_with_little_padding() -> None:
    found = order()
    micro = list(found)
    assert len(micro) == len(found) == 16 * found.micro_batches
    read = [i for rows in micro for i in rows]
    assert sorted(read[:64]) == sorted(read[64:]) == list(range(64))
    assert max(padded(rows) for rows in micro) <= 1024
    real = sum(LENGTHS[i] for i in read)
    assert sum(map(padded, micro)) < 1.15 * real
    assert [sorted(rows) for rows in order()] == [sorted(rows) for rows in micro]


def test_processes_share_each_step_of_one() -> None:
    def steps(found: Steps) -> list[list[int]]:
        rows, n = list(found), found.micro_batches
        return [list(itertools.chain(*rows[a : a + n])) for a in range(0, len(rows), n)]

    alone = steps(order())
    ranks = [order(rank, 2) for rank in (0, 1)]
    assert ranks[0].micro_batches == ranks[1].micro_batches
    for whole, *halves in zip(alone, *map(steps, ranks), strict=True):
        assert sorted(itertools.chain(*halves)) == sorted(whole)
        assert len(halves[0]) == len(halves[1])


def test_samples_of_one_length_are_shared_out_evenly() -> None:
    found = Steps([32] * 10, 8, 2, 0, 1, 0, 3 * 32).divide()
    assert [len(rows) for rows in found] == [2, 3, 3] * 2
