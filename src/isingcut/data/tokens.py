"""Samples of tokens with their padding masks, and batches of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

# Positions that keep a matrix product busy; a smaller batch would cost more than padding does.
_FAST_TOKENS = 256


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Samples of tokens, padded on the right.

    With padding on the right a causal model needs no attention mask: no real token ever sees a
    padded one. What must be left out are losses at padded positions, see `predicted`.

    Args:
        input_ids: (S, T) int64.
        mask: (S, T) bool, true at real tokens, each row a run of true and then of false.
        index: (S,) int64, for a batch the rows it has in the set that `batches` was called on.
        parts: S names, of a mixture's part that each sample is from; empty for one text.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor
    parts: tuple[str, ...] = ()

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[int]], pad: int = 0, parts: Sequence[str] = ()
    ) -> TokenSet:
        """Samples of unequal lengths as one set, padded with the token ``pad``."""
        width = max((len(r) for r in rows), default=0)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        return cls(ids, mask, torch.arange(len(rows)), tuple(parts))

    @property
    def samples(self) -> int:
        """Number of samples S."""
        return self.input_ids.shape[0]

    @property
    def predicted(self) -> torch.Tensor:
        """(S, T-1) bool: position t holds a prediction (of token t+1) that counts in a loss."""
        return self.mask[:, 1:]

    @property
    def tokens(self) -> int:
        """Number of predictions that count, over all samples."""
        return int(self.predicted.sum())

    @property
    def rows_by_part(self) -> dict[str, list[int]]:
        """The samples of each part of a mixture, parts in the order of names; none of one text."""
        names = sorted(set(self.parts))
        rows = {name: [i for i, part in enumerate(self.parts) if part == name] for name in names}
        return rows if len(names) > 1 else {}

    def select(self, indices: Sequence[int] | torch.Tensor) -> TokenSet:
        """The given rows as a set of their own, trimmed to its longest sample."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        chosen = self._trimmed(rows)
        return TokenSet(chosen.input_ids, chosen.mask, torch.arange(len(rows)), chosen.parts)

    def batches(self, max_tokens: int) -> list[TokenSet]:
        """All samples in batches of like length, longest first, in a deterministic order.

        Little padding is computed: a batch that is large enough to be fast takes no sample that
        is more than an eighth shorter than its longest.

        Args:
            max_tokens: upper limit on rows times padded length of a batch; a single sample that
                is longer makes a batch of its own.
        """
        lengths = self.mask.sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        found, start = [], 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            rows = order[start : start + max(1, max_tokens // longest)]
            alike = int((8 * lengths[rows] >= 7 * longest).sum())
            rows = rows[: max(alike, -(-_FAST_TOKENS // longest))]
            found.append(self._trimmed(rows))
            start += len(rows)
        return found

    def _trimmed(self, rows: torch.Tensor) -> TokenSet:
        mask = self.mask[rows]
        width = int(mask.sum(dim=1).max()) if len(rows) else 0
        parts = tuple(self.parts[row] for row in rows.tolist()) if self.parts else ()
        return TokenSet(self.input_ids[rows, :width], mask[:, :width], rows, parts)


def pieces(tokens: TokenSet, length: int) -> TokenSet:
    """Samples of at most so many tokens; what a longer one begins with begins each of its pieces.

    A first token that all samples share is the tokenizer's start token, which a model wants first.
    """
    ids, counts = tokens.input_ids, tokens.mask.sum(1).tolist()
    if max(counts) <= length:
        return tokens
    shared = len(counts) > 1 and bool((ids[:, 0] == ids[0, 0]).all())
    start = [int(ids[0, 0])] if shared else []
    rows, names = [], []
    for row, count in enumerate(counts):
        body, size = ids[row, len(start) : count].tolist(), length - len(start)
        found = [start + body[at : at + size] for at in range(0, len(body), size)]
        # The rest of a sample teaches little where it is a few tokens.
        found = [piece for piece in found if 8 * len(piece) >= length] or found[:1]
        rows += found
        names += [tokens.parts[row]] * len(found) if tokens.parts else []
    return TokenSet.from_rows(rows, parts=names)


def distinct(rows: Iterable[Sequence[int]]) -> Iterator[list[int]]:
    """Rows of two tokens or more, each once, as far as they are iterated."""
    seen: set[tuple[int, ...]] = set()
    for row in map(tuple, rows):
        if len(row) > 1 and row not in seen:
            seen.add(row)
            yield list(row)
