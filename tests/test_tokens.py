"""Token sets and their batches: every sample once, little padding, the same batches every time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isingcut.data.tokens import TokenSet


def of_lengths(lengths):
    return TokenSet.from_rows([[i + 1] * length for i, length in enumerate(lengths)])


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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 40))
def test_batches_hold_every_sample_once_and_no_useless_padding(lengths, limit):
    tokens = TokenSet.from_rows([[10 * i + j for j in range(n)] for i, n in enumerate(lengths)])
    batches = tokens.batches(limit)
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(len(lengths)))
    for batch in batches:
        width = batch.input_ids.shape[1]
        assert bool(batch.mask.any(0).all())
        assert batch.samples == 1 or batch.samples * width <= limit
        for row, i in enumerate(batch.index.tolist()):
            assert batch.input_ids[row, : lengths[i]].tolist() == [
                10 * i + j for j in range(lengths[i])
            ]
            assert int(batch.mask[row].sum()) == lengths[i]
    assert sum(b.tokens for b in batches) == tokens.tokens == sum(n - 1 for n in lengths)


def test_padding_is_on_the_right_and_never_predicted():
    tokens = TokenSet.from_rows([[5, 6, 7], [8], [9, 9]], pad=3)
    assert tokens.input_ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 9, 3]]
    assert tokens.predicted.tolist() == [[True, True], [False, False], [True, False]]
    assert tokens.tokens == 3
    part = tokens.select([2, 1])
    assert part.input_ids.tolist() == [[9, 9], [8, 3]]
    assert part.index.tolist() == [0, 1]
