"""How much of one split's text stands in others too, by n-grams of tokens.

A passage that stands in several splits makes figures on the later ones too good. Documents that are
equal as a whole never come into two splits; passages inside them may.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from isingcut.data.tokens import TokenSet

_Hashes = npt.NDArray[np.uint64]

# Tokens of an n-gram: the longest that is at most half of a sample. Of 32 tokens, hardly a sentence
# comes twice by chance.
_SIZES = (32, 16, 8)
# Samples that are hashed at a time.
_ROWS = 1024
_FACTORS = np.random.default_rng(0).integers(2**63, 2**64, 5, np.uint64) | np.uint64(1)


def overlap(tokens: TokenSet, others: Sequence[TokenSet]) -> float:
    """Share of the n-grams of a split that stand in another one too; 0 where samples are too short.

    Those that end in a token that does not count are left out.

    Complexity: O(n log n) in the tokens of ``tokens``, and that logarithm for each of ``others``.
    """
    longest = int(tokens.mask.sum(1).max())
    size = next((n for n in _SIZES if n <= longest // 2), 0)
    own = np.concatenate(list(_hashes(tokens, size))) if size else np.zeros(0, np.uint64)
    if not len(own):
        return 0.0
    known, counts = np.unique(own, return_counts=True)
    found = np.zeros(len(known), dtype=bool)
    for other in others:
        for hashes in _hashes(other, size):
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found[places[known[places] == hashes]] = True
    return float(counts[found].sum() / counts.sum())


def _hashes(tokens: TokenSet, size: int) -> Iterator[_Hashes]:
    """The hashes of all n-grams of ``size``, a power of two, some samples at a time."""
    counted = tokens.mask if tokens.counted is None else tokens.counted
    for first in range(0, tokens.samples, _ROWS):
        ids, counts = (x[first : first + _ROWS].numpy() for x in (tokens.input_ids, counted))
        hashes = ids.astype(np.uint64)
        for factor in _FACTORS[: size.bit_length() - 1]:
            # Twice as long: one n-gram and the one behind it.
            step = ids.shape[1] - hashes.shape[1] + 1
            begin, end = hashes[:, :-step], hashes[:, step:]
            hashes = (begin ^ (begin >> np.uint64(31))) * factor + end
        yield hashes[counts[:, size - 1 :]]
