"""Tokenize text; samples of tokens with padding masks, and batches of similar length.

A tokenizer needs about 300 bytes per character of its input. A longer text is split before white
space, where word tokenizers split anyway.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from isingcut.data.text_files import LONGEST, cut
from isingcut.errors import CalibrationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = list[int]
"""Token ids of a sample; a context token, which does not count, is stored as ~id."""

# Positions for efficient matrix products; a smaller batch would cost more than padding.
_FAST_TOKENS = 256


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Samples of tokens, padded on the right.

    With padding on the right, a causal model needs no attention mask: no real token attends to
    padding. Losses at padded positions must be left out, see `predicted`. In a conversation, only
    some tokens may count; the others are context.

    Args:
        input_ids: (S, T) int64.
        mask: (S, T) bool, true at real tokens, which come first in each row.
        index: (S,) int64, for a batch the row of each sample in the original set.
        parts: S names, the source of each sample in a mixture; empty for one text.
        counted: (S, T) bool, true at real tokens whose prediction counts; None if all do.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor
    parts: tuple[str, ...] = ()
    counted: torch.Tensor | None = None

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[int]], pad: int = 0, parts: Sequence[str] = ()
    ) -> TokenSet:
        """Make a set of samples (`Row`) of unequal lengths, padded with the token ``pad``."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
        ids = torch.full(mask.shape, pad, dtype=torch.int64)
        ids[mask] = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
        context = ids < 0
        counted = mask & ~context if bool(context.any()) else None
        ids = torch.where(context, ~ids, ids)
        return cls(ids, mask, torch.arange(len(rows)), tuple(parts), counted)

    @property
    def rows(self) -> list[Row]:
        """The samples without padding, in the form of `from_rows`."""
        ids = self.input_ids
        if self.counted is not None:
            ids = torch.where(self.counted, ids, ~ids)
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]

    @property
    def samples(self) -> int:
        """The number of samples S."""
        return self.input_ids.shape[0]

    @property
    def positions(self) -> int:
        """The number of positions with padding: S times T."""
        return self.input_ids.numel()

    @property
    def predicted(self) -> torch.Tensor:
        """(S, T-1) bool: whether the prediction at position t (of token t+1) counts."""
        return (self.mask if self.counted is None else self.counted)[:, 1:]

    @property
    def compared(self) -> torch.Tensor:
        """(S, T) bool: the positions at which activations are compared.

        These are all real positions or, if only some tokens count, those that predict them.
        """
        if self.counted is None:
            return self.mask
        return torch.nn.functional.pad(self.predicted, (0, 1))

    @property
    def last_compared(self) -> torch.Tensor:
        """(S, T) bool: the last position of `compared` in each sample."""
        left = self.compared.flip(1).cumsum(1).flip(1)
        return self.compared & (left == 1)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(S,) the number of predictions that count, in each sample."""
        return np.asarray(self.predicted.sum(1).numpy())

    @property
    def tokens(self) -> int:
        """The number of predictions that count, over all samples."""
        return int(self.predicted.sum())

    @property
    def rows_by_part(self) -> dict[str, list[int]]:
        """The rows of each source of a mixture, sorted by name; empty for one text."""
        rows: dict[str, list[int]] = {name: [] for name in sorted({*self.parts})}
        for i, name in enumerate(self.parts):
            rows[name].append(i)
        return rows if len(rows) > 1 else {}

    def select(self, indices: Sequence[int] | torch.Tensor) -> TokenSet:
        """Return the given rows as a set, trimmed to the length of its longest sample."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self._trim(rows, torch.arange(len(rows)))

    def first(self, tokens: int, least: int = 1) -> TokenSet:
        """Return the first samples, about ``tokens`` tokens and at least ``least`` samples."""
        seen = self.mask.sum(1).cumsum(0)
        rows = max(least, int((seen < tokens).sum()) + 1)
        return self.select(range(min(rows, self.samples)))

    def batches(self, max_tokens: int) -> list[TokenSet]:
        """Return all samples in batches of similar length, longest first, deterministically.

        To limit padding, a batch that is large enough to be fast takes no sample that is more than
        an eighth shorter than its longest.

        Args:
            max_tokens: upper limit of rows times padded length of a batch; a longer sample gets its
                own batch.
        """
        lengths = self.mask.sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        batches = []
        while len(order):
            longest = max(1, int(lengths[order[0]]))
            rows = order[: max(1, max_tokens // longest)]
            alike = int((8 * lengths[rows] >= 7 * longest).sum())
            rows = rows[: max(alike, -(-_FAST_TOKENS // longest))]
            batches.append(self._trim(rows, rows))
            order = order[len(rows) :]
        return batches

    def halves(self) -> tuple[TokenSet, TokenSet]:
        """Return the first and second half of the samples, each trimmed, with their `index`."""
        first, second = torch.arange(self.samples).chunk(2)
        return (
            self._trim(first, self.index[first]),
            self._trim(second, self.index[second]),
        )

    def _trim(self, rows: torch.Tensor, index: torch.Tensor) -> TokenSet:
        mask = self.mask[rows]
        width = int(mask.sum(dim=1).max()) if len(rows) else 0
        parts = tuple(self.parts[row] for row in rows.tolist()) if self.parts else ()
        counted = None if self.counted is None else self.counted[rows, :width]
        return TokenSet(
            self.input_ids[rows, :width], mask[:, :width], index, parts, counted
        )


def pieces(tokens: TokenSet, length: int) -> TokenSet:
    """Split samples into pieces of at most ``length`` tokens, so that every prediction is in one.

    Each piece begins with the sample's start token, or without one with the token before. A first
    token that all samples share is the tokenizer's start token.
    """
    whole = tokens.rows
    ids = tokens.input_ids
    if max(map(len, whole)) <= length:
        return tokens
    shared = len(whole) > 1 and bool((ids[:, 0] == ids[0, 0]).all())
    size = length - 1
    rows = []
    names: list[str] = []
    for i, row in enumerate(whole):
        starts = range(1, len(row), size)
        cuts = [
            row[0 if shared else at - 1 :][:1] + row[at : at + size] for at in starts
        ]
        cuts = [piece for piece in cuts if has_prediction(piece)]
        # Drop short last pieces, which add little to a training.
        cuts = [piece for piece in cuts if 8 * len(piece) >= length] or cuts[:1]
        rows += cuts
        names += tokens.parts[i : i + 1] * len(cuts)
    return TokenSet.from_rows(rows, parts=names)


def has_prediction(row: Sequence[int]) -> bool:
    """Whether a sample has a prediction that counts."""
    return any(token >= 0 for token in row[1:])


def ids_of(row: Sequence[int]) -> tuple[int, ...]:
    """Return all token ids of a sample, whether they count or not."""
    return tuple(token if token >= 0 else ~token for token in row)


def distinct(rows: Iterable[Sequence[int]]) -> Iterator[Row]:
    """Yield distinct rows with a prediction that counts, lazily."""
    seen: set[tuple[int, ...]] = set()
    for row in map(tuple, rows):
        if has_prediction(row) and row not in seen:
            seen.add(row)
            yield list(row)


def split_text(text: str) -> Iterator[str]:
    """Split a text into pieces of at most `LONGEST` characters."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + cut(text[start : start + LONGEST])
        yield text[start:end]
        start = end
    yield text[start:]


class Encoder:
    """A tokenizer, with the vocabulary limit of its model.

    Args:
        tokenizer: a transformers tokenizer.
        model: model whose number of embedding rows limits the token ids; None sets no limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
    ) -> None:
        self.tokenizer = tokenizer
        embedding: Any = None if model is None else model.get_input_embeddings()
        self._rows = math.inf
        if embedding is not None:
            # Its weights may not be loaded yet.
            self._rows = (
                getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0]
            )

    def __call__(self, text: str, most: int | None = None) -> list[int]:
        """Return the token ids of a text, without special tokens around it.

        Args:
            most: truncate to this many tokens.

        Raises:
            CalibrationError: the tokenizer fails on the text, or the model lacks a token.
        """
        ids: list[int] = []
        for piece in split_text(text):
            ids += self.check_ids(_ids(self.tokenizer, piece, special=False))
            if most is not None and len(ids) >= most:
                return ids[:most]
        return ids

    def check_ids(self, ids: list[int]) -> list[int]:
        """Return ``ids`` if the model's embedding has a row for each.

        Raises:
            CalibrationError: a row is missing; the message names the token.
        """
        largest = max(ids, default=0)
        if largest >= self._rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise CalibrationError(
                f"the tokenizer produces the token {token!r} with id {largest}, but the "
                f"model's embedding has only {self._rows} rows; resize the model "
                "(model.resize_token_embeddings(len(tokenizer)), then save it), use the tokenizer "
                "it was trained with, or choose text without that token"
            )
        return ids

    @property
    def start(self) -> list[int]:
        """``[BOS]`` if the tokenizer starts every text with it, else empty."""
        bos = self.tokenizer.bos_token_id
        if bos is None or _ids(self.tokenizer, "a", special=True)[:1] != [bos]:
            return []
        return self.check_ids([bos])

    @property
    def pad(self) -> int:
        """The padding token; no result depends on it."""
        pad = self.tokenizer.pad_token_id
        # Fine-tunes often add a padding token without a row in the embedding.
        return 0 if pad is None or pad >= self._rows else int(pad)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    try:
        # verbose=False: a text longer than the model's context is split into samples later.
        ids: Iterable[int] = tokenizer(text, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
    except MemoryError:
        raise
    except BaseException as e:
        # A panic of the tokenizers library, written in Rust, is not an `Exception`.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise CalibrationError(
            f"the model's tokenizer fails on the text {shown!r} ({one_line(e)}); its "
            "tokenizer.json is damaged or of another version: use the published one"
        ) from e
    return list(ids)


# Tokens of an n-gram: the longest that is at most half of a sample. Hardly any 32 tokens repeat by
# chance.
_SIZES = (32, 16, 8)


def overlap(
    tokens: TokenSet, others: Sequence[TokenSet], sizes: Sequence[int] = _SIZES
) -> float:
    """Return the share of a split's n-grams that are in another split too; 0 for short samples.

    A passage in several splits makes results on the later splits too good. Equal documents are
    never in two splits, but equal passages may be. N-grams that end in a token that does not count
    are left out.

    Args:
        sizes: lengths of the n-grams, the largest first; the first that half of a sample holds.

    Complexity: linear in the number of tokens.
    """
    longest = int(tokens.mask.sum(1).max())
    size = next((n for n in sizes if n <= longest // 2), 0)
    own = Counter(_ngrams(tokens, size)) if size else Counter[bytes]()
    if not own:
        return 0.0
    shared = {n for other in others for n in _ngrams(other, size) if n in own}
    return sum(own[n] for n in shared) / own.total()


def _ngrams(tokens: TokenSet, size: int) -> Iterator[bytes]:
    """Yield the bytes of all n-grams of a size."""
    counted = tokens.mask if tokens.counted is None else tokens.counted
    for ids, counts in zip(tokens.input_ids.numpy(), counted.numpy(), strict=True):
        data = ids.tobytes()
        width = ids.itemsize
        for start in np.flatnonzero(counts[size - 1 :]).tolist():
            yield data[width * start : width * (start + size)]
