"""Text to heal with: everything of a source but what is reported on, in samples of one length.

A run's patch is fitted on the text that its energy was measured on, and on more of the source
where that is too little (`to_fit`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isingcut.data.corpora import Corpus, read
from isingcut.data.encoder import Encoder
from isingcut.data.text_files import only_once
from isingcut.data.tokens import TokenSet, distinct
from isingcut.errors import CalibrationError, IsingcutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isingcut.data.calibration import Calibration


@dataclass(frozen=True, eq=False)
class HealingText:
    """What to train on and what to report on; no document is in both.

    Attributes:
        train: packed samples of full length, or one conversation a sample.
        report: the same, other documents.
        kind: of the source, as `corpora.Corpus` has it.
    """

    train: TokenSet
    report: TokenSet
    kind: str


def build(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    report_samples: int,
    length: int,
    seed: int,
    used: Calibration | None = None,
    model: PreTrainedModel | None = None,
) -> HealingText:
    """Read a source to its end, or as far as is asked for.

    Args:
        source: as for a calibration, but not ``"self"``.
        samples: training samples; None takes all there are.
        report_samples: samples kept for reporting; they come first.
        length: tokens per sample; a conversation is cut there.
        seed: order of the documents.
        used: a calibration of the same source and seed, whose text is left out.
        model: its embedding bounds the token ids.

    Raises:
        CalibrationError: unreadable or too short.
    """
    corpus = read(source, tokenizer, seed)
    encode = Encoder(tokenizer, model)

    documents: Iterator[list[int]] = (ids for ids in map(encode, corpus.documents) if ids)
    prefix = encode.start
    if corpus.kind == "chat":
        rows = _conversations(documents, length, used)
        report = list(itertools.islice(rows, report_samples))
        train = list(itertools.islice(rows, samples))
    else:
        body = length - len(prefix)
        documents = _unused(corpus, documents, used)
        if corpus.kind == "text":
            pieces = _pieces(itertools.chain.from_iterable(documents), body)
            report = list(itertools.islice(pieces, report_samples))
        else:
            separator = encode.separator
            # Only whole documents go to the report, so that none goes to both.
            report = []
            held: list[int] = []
            while len(report) < report_samples and (ids := next(documents, None)) is not None:
                held += (separator if held else []) + ids
                while len(held) >= body and len(report) < report_samples:
                    report.append(held[:body])
                    held = held[body:]
            pieces = _pieces(_joined(documents, separator), body)
        train = list(itertools.islice(pieces, samples))
        report, train = ([prefix + row for row in rows] for rows in (report, train))
    if len(report) < report_samples or not train or (samples and len(train) < samples):
        wanted = f"{samples} training samples" if samples else "at least one training sample"
        raise CalibrationError(
            f"{source} is too short: {report_samples} report samples and {wanted} of "
            f"{length} tokens were asked for, found {len(report)} and {len(train)}; give more "
            "text, or lower --samples, --report-samples or --length"
        )
    kept, reported = (TokenSet.from_rows(rows, encode.pad) for rows in (train, report))
    return HealingText(kept, reported, corpus.kind)


@dataclass(frozen=True, eq=False)
class FittingText:
    """What a patch is fitted on.

    Attributes:
        tokens: samples of the calibration's length.
        searched: how many of them the energy was measured on; they come first.
        short: why there are fewer tokens than were asked for; empty where there are as many.
    """

    tokens: TokenSet
    searched: int
    short: str


def to_fit(
    used: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    model: PreTrainedModel | None = None,
) -> FittingText:
    """About ``most`` tokens that neither rank nor report: of the energy's split, then unused ones.

    Args:
        used: a run's calibration; its source is read on where its energy split is too short.
        most: tokens, those without a prediction among them.
        model: its embedding bounds the token ids.
    """
    split, encode = used.splits["energy"], Encoder(tokenizer, model)
    counts = split.mask.sum(1)
    own = split.select(range(min(split.samples, int((counts.cumsum(0) < most).sum()) + 1)))
    pairs = zip(own.input_ids.tolist(), own.mask.sum(1).tolist(), strict=True)
    rows = [ids[:count] for ids, count in pairs]
    missing, short = most - int(own.mask.sum()), ""
    if missing > 0 and used.source == "self":
        short = "the model wrote no more"
    elif missing > 0 and only_once(used.source):
        short = "a pipe is read once"
    elif missing > 0:
        try:
            for row in _further(used, encode):
                rows.append(row)
                missing -= len(row)
                if missing <= 0:
                    break
            else:
                short = "the source has no more"
        except IsingcutError as e:
            # It may be gone since: a file that was moved, texts that were handed over in Python.
            short = f"the source cannot be read on: {e}"
    return FittingText(TokenSet.from_rows(rows, encode.pad), own.samples, short)


def _further(used: Calibration, encode: Encoder) -> Iterator[list[int]]:
    """Samples of a calibration's source that none of its splits holds."""
    corpus, length = read(used.source, encode.tokenizer, used.meta["seed"]), used.meta["length"]
    documents: Iterator[list[int]] = (ids for ids in map(encode, corpus.documents) if ids)
    if corpus.kind == "chat":
        yield from _conversations(documents, length, used)
        return
    prefix, unused = encode.start, _unused(corpus, documents, used)
    separator = encode.separator if corpus.kind == "documents" else []
    for piece in _pieces(_joined(unused, separator), length - len(prefix)):
        yield prefix + piece


def _unused(
    corpus: Corpus, documents: Iterator[list[int]], used: Calibration | None
) -> Iterator[list[int]]:
    """The documents that a calibration has not taken; of running text, what comes after it."""
    if used is None:
        return documents
    if corpus.kind == "documents":
        return itertools.islice(documents, int(used.meta.get("documents", 0)), None)
    skip = sum(int(t.mask.sum()) for t in used.splits.values())
    running = itertools.islice(itertools.chain.from_iterable(documents), skip, None)
    return ([token] for token in running)


def _joined(documents: Iterator[list[int]], separator: list[int]) -> Iterator[int]:
    return itertools.chain.from_iterable(
        (separator if i else []) + ids for i, ids in enumerate(documents)
    )


def _conversations(
    documents: Iterator[list[int]], length: int, used: Calibration | None
) -> Iterator[list[int]]:
    taken: set[tuple[int, ...]] = set()
    cut = int(used.meta["length"]) if used is not None else 0
    for split in used.splits.values() if used is not None else ():
        pairs = zip(split.input_ids.tolist(), split.mask.sum(1).tolist(), strict=True)
        taken |= {tuple(row[:count]) for row, count in pairs}
    return distinct(ids[:length] for ids in documents if tuple(ids[:cut]) not in taken)


def _pieces(tokens: Iterator[int], size: int) -> Iterator[list[int]]:
    """Full pieces only."""
    while len(piece := list(itertools.islice(tokens, size))) == size:
        yield piece
