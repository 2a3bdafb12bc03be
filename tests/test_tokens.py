"""Batches of like length: every sample once, little padding, the same batches every time."""

import numpy as np
import pytest

from isingcut.data.tokens import TokenSet


def of_lengths(lengths: list[int]) -> TokenSet:
    return TokenSet.from_rows([[i + 1] * length for i, length in enumerate(lengths)])


@pytest.mark.parametrize("most", [1, 100, 1024, 100_000])
def test_every_sample_is_in_one_batch_within_the_limit(most):
    lengths = np.random.default_rng(0).integers(2, 300, 57).tolist()
    batches = of_lengths(lengths).batches(most)
    assert sorted(int(i) for b in batches for i in b.index) == list(range(57))
    for batch in batches:
        assert batch.samples == 1 or batch.input_ids.numel() <= most
        assert batch.mask.sum(1).tolist() == [lengths[int(i)] for i in batch.index]
        assert [int(row[0]) - 1 for row in batch.input_ids] == batch.index.tolist()


def test_large_batches_are_padded_by_an_eighth_at_most():
    lengths = np.random.default_rng(1).integers(2, 300, 400).tolist()
    batches = of_lengths(lengths).batches(2048)
    for batch in batches:
        shortest, longest = int(batch.mask.sum(1).min()), batch.input_ids.shape[1]
        assert 8 * shortest >= 7 * longest or (batch.samples - 1) * longest < 256
    computed = sum(b.input_ids.numel() for b in batches)
    assert computed < 1.1 * sum(lengths)


def test_few_short_samples_stay_one_batch():
    assert len(of_lengths([14, 9, 14, 3]).batches(1024)) == 1


def test_equal_lengths_fill_the_batches():
    assert [b.samples for b in of_lengths([256] * 10).batches(1024)] == [4, 4, 2]
