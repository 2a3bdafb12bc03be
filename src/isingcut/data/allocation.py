"""The samples of one text for the three splits, no document (nor its duplicate) in two of them.

Tokens are given out in the order report, rank, energy, so the reported text stays the same when
the energy is measured on more samples.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from isingcut.data.answers import row_of
from isingcut.data.corpora import Corpus, is_new
from isingcut.data.encoder import Encoder
from isingcut.data.tokens import Row, counts, distinct
from isingcut.errors import CalibrationError

SPLITS = ("energy", "rank", "report")
ALLOCATION = ("report", "rank", "energy")

Rows = dict[str, list[Row]]


class Text(ABC):
    """One text, asked for a sample at a time and then for all of them.

    Attributes:
        facts: what is known of it, JSON-able.
    """

    def __init__(self, kind: str) -> None:
        self.facts: dict[str, Any] = {"kind": kind}

    @abstractmethod
    def take(self, split: str) -> int:
        """Ask for one more sample of a split, in the order of `ALLOCATION`; says its tokens that
        count.

        Raises:
            CalibrationError: too short, if that is known by now.
        """

    @abstractmethod
    def rows(self) -> Rows:
        """The samples that were asked for, by split.

        Raises:
            CalibrationError: too short.
        """


class Conversations(Text):
    """One sample a conversation; those that agree in all their kept tokens count once.

    Args:
        corpus: of kind ``"chat"``.
        length: tokens that are kept of one.
        counts: samples of all splits.
        share: of their tokens that this text has.
        seen: texts that other parts of a mixture have; see `corpora.is_new`.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Encoder,
        length: int,
        counts: Mapping[str, int],
        share: float,
        seen: set[int],
    ) -> None:
        super().__init__(corpus.kind)
        self._name, self._length, self._counts, self._share = corpus.name, length, counts, share
        self._rows: Rows = {name: [] for name in ALLOCATION}
        self._stream = distinct(
            row_of(encode, text, length) for text in corpus.documents if is_new(text, seen)
        )

    def take(self, split: str) -> int:
        row = next(self._stream, None)
        if row is None:
            raise CalibrationError(self._too_short())
        self._rows[split].append(row)
        return counts(row)

    def rows(self) -> Rows:
        return self._rows

    def _too_short(self) -> str:
        found = [len(row) for split in self._rows.values() for row in split]
        needed = f"{sum(self._counts.values())} different conversations"
        if self._share < 1:
            needed = f"{self._share:.0%} of their tokens from different conversations"
        return (
            f"{self._name} is too short: {_words(self._counts)} samples need {needed} of up to "
            f"{self._length} tokens, found {len(found)} ({sum(found)} tokens); give more, or "
            "lower --samples, --rank-samples or --report-samples"
        )


class _Counted(Text):
    """Samples of full length: they are counted first and made at the end."""

    def __init__(self, kind: str, length: int) -> None:
        super().__init__(kind)
        self._length = length
        self._counts = dict.fromkeys(ALLOCATION, 0)

    def take(self, split: str) -> int:
        self._counts[split] += 1
        return self._length


class Generated(_Counted):
    """Text of the model's own.

    Args:
        make: rows for counts by split.
    """

    def __init__(self, make: Callable[[Mapping[str, int]], Rows], length: int) -> None:
        super().__init__("generated", length)
        self._make = make

    def rows(self) -> Rows:
        return self._make(self._counts)


class Packed(_Counted):
    """Full-length samples out of running text or of concatenated documents.

    Args:
        corpus: not of kind ``"chat"``.
        length: tokens of a sample.
        seen: texts that other parts of a mixture have; see `corpora.is_new`.
    """

    def __init__(self, corpus: Corpus, encode: Encoder, length: int, seen: set[int]) -> None:
        super().__init__(corpus.kind, length)
        self._corpus, self._encode, self._seen = corpus, encode, seen

    def rows(self) -> Rows:
        corpus, encode, counts = self._corpus, self._encode, self._counts
        prefix = encode.start
        body = self._length - len(prefix)
        needs = {name: counts[name] * body for name in ALLOCATION}
        # No sample uses more of one document than all samples together need.
        most = sum(needs.values())
        documents: list[list[int]] = []
        read = 0

        def tokenised() -> Iterator[list[int]]:
            nonlocal read
            for text in corpus.documents:
                if ids := encode(text, most):
                    read += 1
                    # Pieces of a running text may be alike, documents may not.
                    if corpus.kind == "text" or is_new(text, self._seen):
                        documents.append(ids)
                        yield ids

        streams = None
        if corpus.kind == "documents":
            streams = _by_document(tokenised(), needs, encode.separator)
        # Running text, and one or two documents, which cannot fill three splits.
        if streams is None and len(documents) < len(needs):
            streams = _by_range(itertools.chain(list(documents), tokenised()), needs)
        if streams is None:
            raise CalibrationError(_too_short(corpus, documents, counts, self._length, most))
        if corpus.kind == "documents":
            self.facts["documents"] = read
        return {
            name: [prefix + ids[i : i + body] for i in range(0, needs[name], body)]
            for name, ids in streams.items()
        }


def _by_document(
    documents: Iterator[list[int]], needs: Mapping[str, int], separator: list[int]
) -> dict[str, list[int]] | None:
    """Whole documents to one split after the other; None when they run out."""
    streams: dict[str, list[int]] = {}
    for name, need in needs.items():
        taken: list[int] = []
        while len(taken) < need:
            ids = next(documents, None)
            if ids is None:
                return None
            taken += (separator if taken else []) + ids
        streams[name] = taken[:need]
    return streams


def _by_range(pieces: Iterable[list[int]], needs: Mapping[str, int]) -> dict[str, list[int]] | None:
    """Consecutive token ranges to one split after the other; None when they run out."""
    stream = itertools.chain.from_iterable(pieces)
    streams = {name: list(islice(stream, need)) for name, need in needs.items()}
    return streams if all(len(streams[name]) == need for name, need in needs.items()) else None


def _too_short(
    corpus: Corpus, documents: list[list[int]], counts: Mapping[str, int], length: int, needed: int
) -> str:
    found = sum(map(len, documents))
    held = f"{found} in {len(documents)} documents" if corpus.kind == "documents" else str(found)
    why = " (the three splits may not share a document)" if found >= needed else ""
    return (
        f"{corpus.name} is too short: {_words(counts)} samples of {length} tokens need {needed} "
        f"tokens, found {held}{why}; give more text, or lower --length, --samples, "
        "--rank-samples or --report-samples"
    )


def _words(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{counts[name]} {name}" for name in SPLITS)
