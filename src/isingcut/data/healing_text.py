"""Text to heal with: everything of a source but what is reported on, in samples of one length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isingcut.data.corpora import read
from isingcut.data.encoder import Encoder
from isingcut.data.tokens import TokenSet, distinct
from isingcut.errors import CalibrationError

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
        if corpus.kind == "text":
            running = itertools.chain.from_iterable(documents)
            skip = sum(int(t.mask.sum()) for t in used.splits.values()) if used is not None else 0
            pieces: Iterator[list[int]] = _pieces(itertools.islice(running, skip, None), body)
            report = list(itertools.islice(pieces, report_samples))
        else:
            skip = int(used.meta.get("documents", 0)) if used is not None else 0
            documents = itertools.islice(documents, skip, None)
            separator = encode.separator
            # Only whole documents go to the report, so that none goes to both.
            report = []
            held: list[int] = []
            while len(report) < report_samples and (ids := next(documents, None)) is not None:
                held += (separator if held else []) + ids
                while len(held) >= body and len(report) < report_samples:
                    report.append(held[:body])
                    held = held[body:]
            joined = itertools.chain.from_iterable(
                (separator if i else []) + ids for i, ids in enumerate(documents)
            )
            pieces = _pieces(joined, body)
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
