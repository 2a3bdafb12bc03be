"""Text for healing and for its report, and text to fit a patch on."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from isingcut.data.calibration import (
    Calibration,
    TextSampler,
    say_left_out,
    tokens_of,
)
from isingcut.data.corpora import NO_WIKI, has_wiki
from isingcut.data.mixture import describe_source, parts_of, places_in, shares_text
from isingcut.data.text_files import is_read_once
from isingcut.data.tokens import Row, TokenSet, overlap
from isingcut.errors import IsingcutError
from isingcut.files.cuts import FittedText
from isingcut.options.heal import HealConfig
from isingcut.options.text import TEXT


@dataclass(frozen=True, eq=False)
class HealingText:
    """The training samples and the report samples; no document is in both.

    Attributes:
        train: packed samples of full length, or one conversation per sample.
        report: samples of other documents.
        overlap: share of the report text that is in the training text too, see `overlap`.
        seconds: how long it took to read it, and the teacher to write ``"chat"``.
    """

    train: TokenSet
    report: TokenSet
    overlap: float
    seconds: float = 0.0


def build(
    source: str,
    sampler: TextSampler,
    *,
    samples: int | None,
    report_samples: int,
    own: TokenSet | None = None,
) -> HealingText:
    """Read a text, or a mixture of several, to its end or until there are enough samples.

    A mixture keeps its shares of tokens: without ``samples``, reading stops when the first source
    ends.

    Args:
        source: as for a calibration, but not ``"self"``; ``"chat"`` ends after its share of the
            tokens that the sampler's writer expects.
        sampler: makes the samples.
        samples: training samples; None takes all.
        report_samples: samples for reporting; they are read first.
        own: report samples of a calibration, instead of further text.

    Raises:
        CalibrationError: the text is unreadable or too short.
    """
    began = time.monotonic()
    if sampler.chat is not None:
        sampler = replace(sampler, chat=replace(sampler.chat, ends=True))
    pad = sampler.encode.pad
    texts = sampler.open(parts_of(source), 2)
    if own is None:
        report, _ = sampler.draw(texts, 0, "report", report_samples)
        own = tokens_of(report, texts, pad)
    drawn, _ = sampler.draw(texts, 1, "train", samples, least=1)
    train = tokens_of(drawn, texts, pad)
    say_left_out(texts, sampler.longest)
    shared = overlap(own, [train])
    return HealingText(train, own, shared, time.monotonic() - began)


def to_fit(
    used: Calibration,
    sampler: TextSampler,
    most: int,
    healing: HealConfig | None = None,
    share: float = 0.0,
) -> tuple[TokenSet, FittedText]:
    """Return about ``most`` tokens outside the rank and report splits, and a record of them.

    The energy split comes first, then more of the source, or the training text of a healing, then
    a share of the default text.

    Args:
        used: calibration of a run; its source is read further if its energy split is too short.
        sampler: makes the samples, with the length and the seed of the calibration or the healing.
        most: number of tokens, including those without a prediction.
        healing: options of the healing that follows, with a length; its report text stays unseen.
        share: share of the tokens to take from the default text, unless the source has a part of
            it; documents of the calibration are left out.
    """
    source = used.source
    length = used.meta["length"]
    seed = used.meta["seed"]
    if healing is not None:
        source = healing.text
        length = healing.length
        seed = healing.seed
    sampler = replace(sampler, length=length, seed=seed, used=used)
    mixed = round(share * most) if is_mixed(used.source, source) else 0
    unmixed = NO_WIKI if mixed and not has_wiki() else ""
    mixed = 0 if unmixed else mixed
    own = used.splits["energy"].first(most - mixed)
    rows = own.rows
    general: list[Row] = []
    missing = max(0, most - mixed - int(own.mask.sum()))
    places = places_in(source)
    unread = ""
    if "self" in places:
        unread = "the model wrote no more"
    elif any(map(is_read_once, places)):
        unread = "a pipe is read once"
    short = unread if missing else ""
    try:
        parts = () if unread else parts_of(source)
        others = parts_of(TEXT) if mixed else ()
        splits, turns = (1, "further") if healing is None else (2, "train")
        # Opened together, so that the default text repeats no document of the calibration.
        both = (*parts, *others) if missing or mixed else ()
        texts = sampler.open(both, splits)
        further = texts[: len(parts)]
        if further and missing:
            if healing is not None:
                unseen = healing.report_samples
                sampler.draw(further, 0, "report", unseen)
            drawn, ended = sampler.draw(further, -1, turns, None, most=missing)
            rows += [row for _, row in drawn]
            short = "the source has no more" if ended else ""
        mixable = texts[len(parts) :]
        drawn, _ = sampler.draw(mixable, -1, "mixed", None, most=mixed)
        general = [row for _, row in drawn]
    except IsingcutError:
        # A moved file, or texts passed in Python. The error may name a private folder.
        short = "the source was changed or cannot be read; restore the old text to fit on more"
        # Without the source, its documents cannot be left out of the default text.
        unmixed = short if mixed else unmixed
    tokens = TokenSet.from_rows(rows + general, sampler.encode.pad)
    named = [used.source, source] + [TEXT] * bool(general)
    return tokens, FittedText(
        source=" + ".join(dict.fromkeys(map(describe_source, named))),
        samples=tokens.samples,
        searched=own.samples,
        mixed=sum(map(len, general)),
        unmixed=unmixed,
        tokens=int(tokens.mask.sum()),
        requested=most,
        short=short,
    )


def is_mixed(*sources: str) -> bool:
    """Whether a patch's text gets a share of the default text: no source has a part of it."""
    return not any(shares_text(source, TEXT) for source in sources)
