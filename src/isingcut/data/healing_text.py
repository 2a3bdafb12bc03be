"""Text to train on: all of a source but what is reported on, and what a patch is fitted on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isingcut.data.conversations import row_of
from isingcut.data.corpora import Corpus, is_new, read, refuse_changed
from isingcut.data.mixture import Part, Turns, name_part, parts_of, places_in
from isingcut.data.text_files import only_once
from isingcut.data.tokens import Encoder, Row, TokenSet, count_tokens, distinct, ids_of, overlap
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
        kind: of the source, as `corpora.Corpus` has it, or ``"mixture"``.
        overlap: share of the report text that stands in the training text too, see `overlap`.
    """

    train: TokenSet
    report: TokenSet
    kind: str
    overlap: float


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
    """Read a text, or a mixture of several, to its end or as far as is asked for.

    A mixture keeps its shares of tokens: without ``samples`` it ends where one of its parts does.

    Args:
        source: as for a calibration, but without ``"self"``.
        samples: training samples; None takes all there are.
        report_samples: samples kept for reporting; they come first.
        length: tokens per sample; a conversation is cut there.
        seed: order of the documents.
        used: a calibration whose text is left out; documents only where the seed is the same.
        model: its embedding bounds the token ids.

    Raises:
        CalibrationError: unreadable or too short.
    """
    parts = parts_of(source)
    encode = Encoder(tokenizer, model)
    kinds, texts = open_parts(parts, encode, length, seed, used)
    found: list[list[tuple[int, Row]]] = []
    ended = ""
    for name, count in (("report", report_samples), ("train", samples)):
        turns = Turns(parts, length, f"{seed} {name}")
        drawn = list(_draw(parts, [pair[len(found)] for pair in texts], turns, count))
        if count is None or len(drawn) < count:
            ended = ended or parts[turns.next(None if count is None else count - len(drawn))].name
        found.append(drawn)
    report, train = found
    if len(report) < report_samples or not train or (samples and len(train) < samples):
        wanted = f"{samples} training samples" if samples else "at least one training sample"
        asked = "" if len(parts) == 1 else f" of the mixture {source!r}"
        raise CalibrationError(
            f"{ended} is too short: {report_samples} report samples and {wanted}{asked} of "
            f"{length} tokens were asked for, found {len(report)} and {len(train)}; give more "
            "text, or lower --samples, --report-samples or --length"
        )
    to_report, to_train = (
        TokenSet.from_rows(
            [row for _, row in drawn],
            encode.pad,
            [parts[i].name for i, _ in drawn] if len(parts) > 1 else [],
        )
        for drawn in found
    )
    kind = kinds[0] if len(parts) == 1 else "mixture"
    return HealingText(to_train, to_report, kind, overlap(to_report, [to_train]))


def open_parts(
    parts: Sequence[Part], encode: Encoder, length: int, seed: int, used: Calibration | None
) -> tuple[list[str], list[tuple[Iterator[Row], Iterator[Row]]]]:
    """Each part's kind and two readers of its samples; the second begins with a new document.

    Args:
        used: a calibration whose text is left out; documents only where the seed is the same.

    Raises:
        CalibrationError: unreadable; a file that was changed since the calibration was made of it;
            or ``"self"``, of which none is left over.
    """
    seen: set[int] = set()
    corpora = []
    for part in parts:
        with name_part(part, parts):
            if used is not None:
                refuse_changed(used.meta.get("texts", {}), part.source)
            if part.source == "self":
                raise CalibrationError("healing needs real text, not 'self'")
            corpora.append(read(part.source, encode.tokenizer, seed))
            # In all parts before one is read on, which must not repeat what was measured on.
            _skip_documents(corpora[-1], encode, used, part.source, seed, seen)
    texts = []
    for part, corpus in zip(parts, corpora, strict=True):
        if corpus.kind == "documents":
            # Two readers of the same documents: none that the first began goes to the second.
            texts.append(
                (_packed(corpus, encode, length, seen), _packed(corpus, encode, length, seen))
            )
        elif corpus.kind == "chat":
            rows = _conversations(corpus, encode, length, used, seen)
            texts.append((rows, rows))
        else:
            rows = _pieces(corpus, encode, length, _facts(used, part.source))
            texts.append((rows, rows))
    return [corpus.kind for corpus in corpora], texts


def _draw(
    parts: Sequence[Part], texts: Sequence[Iterator[Row]], turns: Turns, count: int | None = None
) -> Iterator[tuple[int, Row]]:
    """Samples of all parts in turn, each with its part, until there are ``count`` or one ends."""
    drawn = 0
    while count is None or drawn < count:
        i = turns.next(None if count is None else count - drawn)
        with name_part(parts[i], parts):
            row = next(texts[i], None)
        if row is None:
            return
        turns.took(i, count_tokens(row))
        drawn += 1
        yield i, row


def _facts(used: Calibration | None, source: str) -> Mapping[str, Any]:
    """What a calibration says of its text, or of the part of it, that is from a source."""
    if used is None:
        return {}
    if used.source == source:
        tokens = sum(int(split.mask.sum()) for split in used.splits.values())
        return {**used.meta, "tokens": tokens}
    parts: Sequence[Mapping[str, Any]] = used.meta.get("parts", ())
    return next((part for part in parts if part["source"] == source), {})


def _skip_documents(
    corpus: Corpus,
    encode: Encoder,
    used: Calibration | None,
    source: str,
    seed: int,
    seen: set[int],
) -> None:
    """Pass over the documents that a calibration read; another seed has them in another order."""
    if used is None or corpus.kind != "documents" or used.meta.get("seed") != seed:
        return
    left = int(_facts(used, source).get("documents", 0))
    while left and (text := next(corpus.documents, None)) is not None:
        is_new(text, seen)
        # Counted as the calibration counts them: those that have tokens.
        left -= bool(encode(text, 1))


def _packed(corpus: Corpus, encode: Encoder, length: int, seen: set[int]) -> Iterator[list[int]]:
    """Full samples out of documents that follow one another; the first begins a document."""
    prefix, separator = encode.start, encode.separator
    body = length - len(prefix)
    left: list[int] = []
    between: list[int] = []
    for text in corpus.documents:
        if not is_new(text, seen) or not (ids := encode(text)):
            continue
        left += between + ids
        between = separator
        while len(left) >= body:
            yield prefix + left[:body]
            left = left[body:]


def _conversations(
    corpus: Corpus, encode: Encoder, length: int, used: Calibration | None, seen: set[int]
) -> Iterator[Row]:
    """One sample a conversation, but none that a calibration holds, whatever counts of it there."""
    taken: set[tuple[int, ...]] = set()
    cut = int(used.meta["length"]) if used is not None else 0
    for split in used.splits.values() if used is not None else ():
        taken |= set(map(ids_of, split.rows))
    most = max(cut, length)
    rows = (row_of(encode, text, most) for text in corpus.documents if is_new(text, seen))
    return distinct(row[:length] for row in rows if ids_of(row[:cut]) not in taken)


def _pieces(
    corpus: Corpus, encode: Encoder, length: int, facts: Mapping[str, Any]
) -> Iterator[list[int]]:
    """Full samples out of a running text, behind what a calibration holds of it."""
    prefix = encode.start
    body = length - len(prefix)
    running = itertools.chain.from_iterable(map(encode, corpus.documents))
    tokens = itertools.islice(running, int(facts.get("tokens", 0)), None)
    while len(piece := list(itertools.islice(tokens, body))) == body:
        yield prefix + piece


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
    held = split.mask.sum(1).cumsum(0)
    own = split.select(range(min(split.samples, int((held < most).sum()) + 1)))
    rows = own.rows
    missing, short = most - int(own.mask.sum()), ""
    places = places_in(used.source)
    if missing > 0 and "self" in places:
        short = "the model wrote no more"
    elif missing > 0 and any(map(only_once, places)):
        short = "a pipe is read once"
    elif missing > 0:
        try:
            parts, length, seed = parts_of(used.source), used.meta["length"], used.meta["seed"]
            _, readers = open_parts(parts, encode, length, seed, used)
            turns = Turns(parts, length, f"{seed} further")
            for _, row in _draw(parts, [first for first, _ in readers], turns):
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
