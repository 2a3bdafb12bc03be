"""Text to token ids; samples of tokens with their padding masks, and batches of like length.

A tokenizer needs some 300 bytes for every character that it is given at a time; a longer text is
cut before white space, where tokenizers of words cut anyway.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isingcut.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = list[int]
"""Token ids of a sample; one that is context and does not count stands as its complement, ~id."""

# Positions that keep a matrix product busy; a smaller batch would cost more than padding does.
_FAST_TOKENS = 256


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Samples of tokens, padded on the right.

    With padding on the right a causal model needs no attention mask: no real token ever sees a
    padded one. What must be left out are losses at padded positions, see `predicted`. Of a
    conversation only some tokens may count; the others are context, which the model reads alike.

    Args:
        input_ids: (S, T) int64.
        mask: (S, T) bool, true at real tokens, each row a run of true and then of false.
        index: (S,) int64, for a batch the rows it has in the set that `batches` was called on.
        parts: S names, of a mixture's part that each sample is from; empty for one text.
        counted: (S, T) bool, true at real tokens whose prediction counts; None where all do.
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
        """Samples (each a `Row`) of unequal lengths as one set, padded with the token ``pad``."""
        width = max((len(r) for r in rows), default=0)
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        context = ids < 0
        counted = mask & ~context if bool(context.any()) else None
        ids = torch.where(context, ~ids, ids)
        return cls(ids, mask, torch.arange(len(rows)), tuple(parts), counted)

    @property
    def rows(self) -> list[Row]:
        """The samples without padding, as `from_rows` takes them."""
        ids = self.input_ids
        if self.counted is not None:
            ids = torch.where(self.counted, ids, ~ids)
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]

    @property
    def samples(self) -> int:
        """Number of samples S."""
        return self.input_ids.shape[0]

    @property
    def positions(self) -> int:
        """Number of positions, padding among them: S times T."""
        return self.input_ids.numel()

    @property
    def predicted(self) -> torch.Tensor:
        """(S, T-1) bool: position t holds a prediction (of token t+1) that counts in a loss."""
        return (self.mask if self.counted is None else self.counted)[:, 1:]

    @property
    def looked_at(self) -> torch.Tensor:
        """(S, T) bool: positions that activations are compared at.

        All real ones; where only some tokens count, those that predict them.
        """
        if self.counted is None:
            return self.mask
        return torch.nn.functional.pad(self.predicted, (0, 1))

    @property
    def last_looked_at(self) -> torch.Tensor:
        """(S, T) bool: of `looked_at`, the last position of each sample."""
        left = self.looked_at.flip(1).cumsum(1).flip(1)
        return self.looked_at & (left == 1)

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
        return replace(chosen, index=torch.arange(len(rows)))

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

    def halves(self) -> tuple[TokenSet, TokenSet]:
        """The first and the second half of the samples, each trimmed; they keep their `index`."""
        first, second = torch.arange(self.samples).chunk(2)
        halved = [replace(self._trimmed(r), index=self.index[r]) for r in (first, second)]
        return halved[0], halved[1]

    def _trimmed(self, rows: torch.Tensor) -> TokenSet:
        mask = self.mask[rows]
        width = int(mask.sum(dim=1).max()) if len(rows) else 0
        parts = tuple(self.parts[row] for row in rows.tolist()) if self.parts else ()
        counted = None if self.counted is None else self.counted[rows, :width]
        return TokenSet(self.input_ids[rows, :width], mask[:, :width], rows, parts, counted)


def pieces(tokens: TokenSet, length: int) -> TokenSet:
    """Samples of at most so many tokens; what a longer one begins with begins each of its pieces.

    A first token that all samples share is the tokenizer's start token, which a model wants first.
    """
    whole, ids = tokens.rows, tokens.input_ids
    if max(map(len, whole)) <= length:
        return tokens
    shared = len(whole) > 1 and bool((ids[:, 0] == ids[0, 0]).all())
    size = length - shared
    rows, names = [], []
    for i, row in enumerate(whole):
        start, body = row[:shared], row[shared:]
        found = [start + body[at : at + size] for at in range(0, len(body), size)]
        found = [piece for piece in found if has_prediction(piece)]
        # The rest of a sample teaches little where it is a few tokens.
        found = [piece for piece in found if 8 * len(piece) >= length] or found[:1]
        rows += found
        names += [tokens.parts[i]] * len(found) if tokens.parts else []
    return TokenSet.from_rows(rows, parts=names)


def count_tokens(row: Row) -> int:
    """Tokens of a sample that count, its first one among them."""
    return sum(token >= 0 for token in row)


def has_prediction(row: Sequence[int]) -> bool:
    """Whether a sample has a prediction that counts."""
    return any(token >= 0 for token in row[1:])


def ids_of(row: Sequence[int]) -> tuple[int, ...]:
    """The token ids of a sample, those that count and those that do not."""
    return tuple(token if token >= 0 else ~token for token in row)


def distinct(rows: Iterable[Sequence[int]]) -> Iterator[Row]:
    """Rows that `predicts` says have a prediction, each once, as far as they are iterated."""
    seen: set[tuple[int, ...]] = set()
    for row in map(tuple, rows):
        if has_prediction(row) and row not in seen:
            seen.add(row)
            yield list(row)


LONGEST = 1 << 20
"""Characters that are tokenised at a time."""

_NEAR = 1 << 16
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")


def cut(text: str) -> int:
    """Where a text that goes on ends well: before its last white space, if that is near its end."""
    tail = max(1, len(text) - _NEAR)
    found = _LAST_SPACE.search(text, tail)
    return found.start() if found else len(text)


def split_text(text: str) -> Iterator[str]:
    """A text in pieces of at most `LONGEST` characters; a shorter one is whole."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + cut(text[start : start + LONGEST])
        yield text[start:end]
        start = end
    yield text[start:]


class Encoder:
    """A tokenizer, and how many tokens the model it is used with knows.

    Args:
        tokenizer: any of transformers.
        model: its embedding's rows bound the token ids; None bounds them by nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
    ) -> None:
        self.tokenizer = tokenizer
        embedding: Any = None if model is None else model.get_input_embeddings()
        self._rows: int | None = None
        if embedding is not None:
            # Its weights may be on disk still.
            self._rows = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])

    def __call__(self, text: str, most: int | None = None) -> list[int]:
        """The token ids of a text, without special ones around it.

        Args:
            most: leave off what comes after so many tokens.

        Raises:
            CalibrationError: the tokenizer cannot take the text, or the model a token of it.
        """
        ids: list[int] = []
        for piece in split_text(text):
            ids += self.checked(_ids(self.tokenizer, piece, special=False))
            if most is not None and len(ids) >= most:
                return ids[:most]
        return ids

    def checked(self, ids: list[int]) -> list[int]:
        """``ids`` themselves, if the model's embedding has a row for each.

        Raises:
            CalibrationError: names the token that it lacks.
        """
        largest = max(ids, default=0)
        if self._rows is not None and largest >= self._rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise CalibrationError(
                f"the tokenizer gives the text a token {token!r} with number {largest}, but the "
                f"model's embedding has only {self._rows} rows: the token was added to the "
                "tokenizer and not to the model. Resize the model "
                "(model.resize_token_embeddings(len(tokenizer)), then save it), use the tokenizer "
                "it was trained with, or choose text without that token"
            )
        return ids

    @property
    def start(self) -> list[int]:
        """``[BOS]`` where the tokenizer starts every text with it, else empty."""
        bos = self.tokenizer.bos_token_id
        begins = bos is not None and _ids(self.tokenizer, "a", special=True)[:1] == [bos]
        return self.checked([bos]) if begins else []

    @property
    def pad(self) -> int:
        """The token that fills a batch up; no result depends on it."""
        pad = self.tokenizer.pad_token_id
        # Fine-tunes often add one that the model has no row for.
        return 0 if pad is None or (self._rows is not None and pad >= self._rows) else int(pad)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    try:
        # verbose=False: a text longer than the model's context is cut into samples afterwards.
        ids: Iterable[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except MemoryError:
        raise
    except BaseException as e:
        # A panic of the tokenizers library, which is written in Rust, is no `Exception`.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise CalibrationError(
            f"the model's tokenizer fails on the text {shown!r} ({first_line(e)}); its "
            "tokenizer.json is damaged or of another version: use the one it was published with"
        ) from e
    return list(ids)


# Tokens of an n-gram: the longest that is at most half of a sample. Of 32 tokens, hardly a sentence
# comes twice by chance.
_SIZES = (32, 16, 8)


def overlap(tokens: TokenSet, others: Sequence[TokenSet]) -> float:
    """Share of the n-grams of a split that stand in another one too; 0 where samples are too short.

    A passage that stands in several splits makes figures on the later ones too good. Documents that
    are equal as a whole never come into two splits; passages inside them may. N-grams that end in a
    token that does not count are left out.

    Complexity: linear in the tokens of all.
    """
    longest = int(tokens.mask.sum(1).max())
    size = next((n for n in _SIZES if n <= longest // 2), 0)
    own = Counter(_ngrams(tokens, size)) if size else Counter[bytes]()
    found = {n for other in others for n in (_ngrams(other, size) if own else ()) if n in own}
    return sum(own[n] for n in found) / own.total() if own else 0.0


def _ngrams(tokens: TokenSet, size: int) -> Iterator[bytes]:
    """The bytes of all n-grams of a size."""
    counted = tokens.mask if tokens.counted is None else tokens.counted
    for ids, counts in zip(tokens.input_ids.numpy(), counted.numpy(), strict=True):
        data, width = ids.tobytes(), ids.itemsize
        for start in np.flatnonzero(counts[size - 1 :]).tolist():
            yield data[width * start : width * (start + size)]
