"""Make the calibration: three disjoint splits of token samples, `energy`, `rank` and `report`.

The energy is measured on `energy`, candidates are ranked on `rank`, and reported results are from
`report`. No document (or duplicate) is in two splits. Splits are filled in the order report, rank,
energy, so that the report split does not change if the energy uses more samples.

Healing makes its own splits with the same readers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isingcut.console.printing import say
from isingcut.console.progress import Progress, silent
from isingcut.data.chat import ChatWriter
from isingcut.data.conversations import row_of
from isingcut.data.corpora import (
    Corpus,
    is_new,
    read,
    refuse_changed,
    text_hashes,
    words_for,
)
from isingcut.data.generation import sample_from_model
from isingcut.data.mixture import (
    Part,
    is_same_text,
    name_part,
    parts_of,
    place_of,
)
from isingcut.data.tokens import (
    Encoder,
    Row,
    TokenSet,
    distinct,
    has_prediction,
    ids_of,
    overlap,
)
from isingcut.errors import CalibrationError, InputError
from isingcut.files.results import damaged_error, read_tensors, write_tensors
from isingcut.files.states import CalibrationHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SPLITS = ("energy", "rank", "report")
WHOLE = 1024
"""Tokens of the longest conversation, if samples of running text are shorter."""
# Largest vocabulary whose tokens are about a character each; eight of them are no phrase.
_BYTES = 1000


@dataclass(frozen=True, eq=False)
class Calibration:
    """The three splits of one calibration text, and their provenance.

    Args:
        splits: ``"energy"``, ``"rank"`` and ``"report"``.
        source: the source as given.
        meta: provenance (kind of source, seed, length, documents used, overlap of the splits and
            shared 8-grams),
            JSON-able.
    """

    splits: Mapping[str, TokenSet]
    source: str
    meta: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of the tokens of all splits, with padding and counted tokens."""
        digest = hashlib.sha256()
        for name in SPLITS:
            tokens = self.splits[name]
            digest.update(f"{name}:{tuple(tokens.input_ids.shape)}".encode())
            digest.update(tokens.input_ids.numpy().tobytes())
            digest.update(tokens.mask.numpy().tobytes())
            if tokens.counted is not None:
                digest.update(b"counted" + tokens.counted.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        arrays = {
            f"{name}.{key}": values.numpy()
            for name, tokens in self.splits.items()
            for key in ("input_ids", "mask", "counted")
            if (values := getattr(tokens, key)) is not None
        }
        content = {"source": self.source, "sha256": self.sha256, "meta": self.meta}
        write_tensors(path, CalibrationHeader.kind, arrays, **content)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            StageFileError: the file is missing, damaged, of another kind, or of a newer version.
        """
        header, arrays = read_tensors(path, CalibrationHeader)
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        meta = header["meta"]
        splits = {}
        try:
            for name in SPLITS:
                ids = tensors[f"{name}.input_ids"]
                mask = tensors[f"{name}.mask"]
                counted = tensors.get(f"{name}.counted")
                parts: tuple[str, ...] = ()
                if "parts" in meta:
                    sources = zip(ids, meta["part_of_sample"][name], strict=True)
                    parts = tuple(str(meta["parts"][i]["name"]) for _, i in sources)
                index = torch.arange(len(ids))
                splits[name] = TokenSet(ids, mask, index, parts, counted)
        except (LookupError, TypeError, ValueError) as e:
            raise damaged_error(path, f"{type(e).__name__}: {e}") from e
        loaded = cls(splits, header["source"], meta)
        if loaded.sha256 != header["sha256"]:
            raise damaged_error(path, "its tokens do not match its hash")
        return loaded


def build(
    source: str,
    sampler: TextSampler,
    *,
    samples: int,
    rank_samples: int,
    report_samples: int,
    progress: Progress = silent,
) -> Calibration:
    """Make token samples from a text source, or from a mixture of several.

    Plain text is packed into full samples without padding, each starting with the tokenizer's
    beginning-of-sequence token if it sets one. Each conversation is one sample. No document (or
    duplicate) is in two splits; a text of one document is divided into consecutive ranges. In every
    split, and in any first samples of it, the sources of a mixture have their shares of tokens;
    every source is in every split.

    Args:
        source: a file or pipe (`text_files`), ``"-"``, a `datasets` name or folder, the name of a
            list or of a packaged text, ``"chat"`` or ``"self"``; ``"answers:"`` and a source of
            conversations; or a `mixture` of these.
        sampler: makes the samples; its model writes ``"chat"`` and ``"self"``.
        samples, rank_samples, report_samples: samples in the splits energy, rank and report.
        progress: progress display of ``"self"``.

    Raises:
        CalibrationError: the text is unreadable, malformed or too short.
        InputError: a sample count or the length is too small.
    """
    counts = {"report": report_samples, "rank": rank_samples, "energy": samples}
    parts = parts_of(source)
    length = sampler.length
    seed = sampler.seed
    model = sampler.model
    tokenizer = sampler.tokenizer
    for name, value in {**counts, "length": length - 1}.items():
        if value < 1:
            raise InputError(
                f"calibration needs at least one {name} sample of two tokens"
            )
        if value < len(parts) and name in counts:
            raise InputError(
                f"a mixture of {len(parts)} texts needs as many {name} samples, got {value}; "
                "raise --samples, --rank-samples or --report-samples"
            )
    # Hashed before reading, so that changes are detected when the text is read again.
    hashes = text_hashes(source)
    needed = sum(counts.values())

    def generate() -> Iterator[Row]:
        if model is None:
            raise InputError(
                "the calibration source 'self' needs a model to sample from"
            )
        return sample_from_model(model, tokenizer, needed, length, seed, progress)

    texts = sampler.open(parts, len(SPLITS), most=needed * length, generate=generate)
    drawn: dict[str, Drawn] = {}
    for number, (name, count) in enumerate(counts.items()):
        drawn[name], _ = sampler.draw(texts, number, name, count)
    say_left_out(texts, sampler.longest)
    splits = {
        name: tokens_of(drawn[name], texts, sampler.encode.pad) for name in SPLITS
    }
    energy, rank, report = splits.values()
    earlier = {"rank": (rank, [energy]), "report": (report, [energy, rank])}
    shared = {name: overlap(*splits) for name, splits in earlier.items()}
    meta: dict[str, Any] = {
        "seed": seed,
        "length": length,
        "texts": hashes,
        "overlap": shared,
    }
    if len(tokenizer) > _BYTES:
        meta["repeats"] = {
            name: overlap(*splits, [8]) for name, splits in earlier.items()
        }
    if len(parts) == 1:
        meta |= texts[0].facts
    else:
        tokens = Counter[int]()
        for i, row in itertools.chain.from_iterable(drawn.values()):
            tokens[i] += len(row)
        meta["kind"] = "mixture"
        meta["parts"] = [
            {**vars(text.part), **text.facts, "tokens": tokens[i]}
            for i, text in enumerate(texts)
        ]
        meta["part_of_sample"] = {
            name: [i for i, _ in each] for name, each in drawn.items()
        }
    return Calibration(splits, source, meta)


Drawn = list[tuple[int, Row]]
"""Samples, each with the index of its source in the mixture."""


@dataclass(frozen=True, eq=False)
class OpenText:
    """One text of a mixture, read lazily.

    Attributes:
        part: its source and its share.
        facts: JSON-able facts: ``kind``, the number of ``documents`` read so far, and that of the
            conversations ``left_out``, of which no answer ends within the longest sample.
        readers: one reader of samples per split.
    """

    part: Part
    facts: dict[str, Any]
    readers: Sequence[Iterator[Row]]


@dataclass(frozen=True, eq=False)
class TextSampler:
    """Makes samples of tokens from texts.

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens per sample of running text, at least 2.
        seed: seed of the order of the documents.
        model: model whose embedding limits the token ids.
        used: calibration whose text is left out.
        chat: writes the conversations of the text ``"chat"``.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    seed: int
    model: PreTrainedModel | None = None
    used: Calibration | None = None
    chat: ChatWriter | None = None

    @cached_property
    def encode(self) -> Encoder:
        """The tokenizer with the limit of the model."""
        return Encoder(self.tokenizer, self.model)

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that is a sample: `WHOLE`, but at least ``length`` and
        at most the model's positions."""
        config: Any = getattr(self.model, "config", None)
        positions = getattr(config, "max_position_embeddings", None) or WHOLE
        return max(self.length, min(WHOLE, positions))

    def _read(self, part: Part, seed: int) -> Corpus:
        """Open the source of a part.

        Raises:
            CalibrationError: as `corpora.read`, or no model can write ``"chat"``.
        """
        written = None
        if place_of(part.source) == "chat":
            if self.chat is None:
                raise CalibrationError(
                    "the text 'chat' needs the model that writes it; choose another text"
                )
            written = self.chat(seed, part.share)
        return read(part.source, self.tokenizer, seed, written)

    def open(
        self,
        parts: Sequence[Part],
        splits: int,
        *,
        most: int | None = None,
        generate: Callable[[], Iterator[Row]] | None = None,
    ) -> list[OpenText]:
        """Open each source of a mixture with a reader per split.

        Running text and consecutive documents are packed into full samples. A conversation is one
        sample: whole, or up to the last answer that ends within `longest` tokens.
        Each reader begins with a new document; with fewer documents than splits, they read
        consecutive ranges instead.

        Args:
            most: maximum tokens of one document; None for no limit.
            generate: function that yields samples of ``"self"``; None if real text is needed.

        Raises:
            CalibrationError: the text is unreadable, or a file changed after the calibration was
                made.
        """
        encode = self.encode
        used = self.used
        seen: set[int] = set()
        corpora: list[Corpus] = []
        for part in parts:
            with name_part(part):
                if used is not None:
                    refuse_changed(used.meta.get("texts", {}), part.source)
                if part.source == "self":
                    if generate is None:
                        raise CalibrationError(
                            "healing needs real text; choose another source than 'self'"
                        )
                    corpora.append(Corpus("generated", generate()))
                else:
                    corpora.append(corpus := self._read(part, self.seed))
                    # Skip the documents of the calibration, in its order and in all sources before
                    # any source is read further, so that none repeats them.
                    left = int(_facts(used, part.source).get("documents", 0))
                    measured = corpus
                    if used is not None and left and used.meta["seed"] != self.seed:
                        measured = self._read(part, used.meta["seed"])
                    while (
                        left
                        and (document := next(measured.documents, None)) is not None
                    ):
                        is_new(document, seen)
                        # Counted as in `_tokenise`: documents with tokens.
                        left -= bool(encode(document, 1))
        opened = []
        for part, text in zip(parts, corpora, strict=True):
            facts: dict[str, Any] = {"kind": text.kind}
            with name_part(part):
                if text.kind == "generated":
                    rows = text.documents
                elif text.kind == "chat":
                    rows = distinct(self._conversations(text, seen, facts))
                elif text.kind == "text":
                    known = int(_facts(used, part.source).get("tokens", 0))
                    rows = self._pack(map(encode, text.documents), known)
                else:
                    documents = _tokenise(text, encode, seen, most, facts)
                    first = list(itertools.islice(documents, splits))
                    documents = itertools.chain(first, documents)
                    if len(first) == splits:
                        between = encode("\n\n")
                        # Each reader begins with a new document, and takes the next if it needs
                        # more.
                        each = [
                            self._pack(_join(documents, between)) for _ in range(splits)
                        ]
                        opened.append(OpenText(part, facts, each))
                        continue
                    rows = self._pack(documents)
            opened.append(OpenText(part, facts, [rows] * splits))
        return opened

    def draw(
        self,
        texts: Sequence[OpenText],
        split: int,
        name: str,
        count: int | None,
        *,
        least: int = 0,
        most: float = math.inf,
    ) -> tuple[Drawn, bool]:
        """Draw the samples of one split, so that the sources always have their shares of tokens.

        The next source is the one with the fewest tokens relative to its share. A random fraction
        of a sample is added to the tokens of each source, so that the order has no period. With
        ``count``, every source gets a sample if there are enough.

        Args:
            split: index of the split's readers.
            name: name of the split, from which the random fractions are drawn too.
            count: number of samples; None draws until a source ends.
            least: number of samples that must be there without ``count``.
            most: number of tokens after which to stop.

        Returns:
            the samples, and whether a source ended before the others.

        Raises:
            CalibrationError: a source has too few samples.
        """
        fraction = random.Random(f"{self.seed} {name}").random
        length = self.length
        ahead = [fraction() for _ in texts]
        had = [0] * len(texts)
        tokens = 0
        drawn: Drawn = []

        def due(i: int) -> float:
            return (had[i] + ahead[i] * length) / texts[i].part.share

        while (count is None or len(drawn) < count) and tokens < most:
            new = [i for i in range(len(texts)) if not had[i]]
            scarce = count is not None and count - len(drawn) <= len(new)
            i = min(new if scarce else range(len(texts)), key=due)
            part = texts[i].part
            with name_part(part):
                row = next(texts[i].readers[split], None)
                if row is None:
                    if count is None and len(drawn) >= least:
                        return drawn, True
                    needed = f"{count or least}"
                    if part.share < 1:
                        needed = f"{part.share:.0%} of {needed}"
                    if texts[i].facts["kind"] == "documents":
                        needed += ", from documents of no other split,"
                    lower = "give more text, or lower --length or the number of samples"
                    raise CalibrationError(
                        f"{words_for(place_of(part.source))} is too short: it gives "
                        f"{sum(k == i for k, _ in drawn)} {name} samples of {length} tokens, and "
                        f"{needed} are needed; {left_out(texts[i], self.longest) or lower}"
                    )
            had[i] += sum(token >= 0 for token in row)
            ahead[i] = fraction()
            drawn.append((i, row))
            tokens += len(row)
        return drawn, False

    def _pack(self, texts: Iterable[list[int]], skipped: int = 0) -> Iterator[Row]:
        """Cut a running text into full samples, after its first ``skipped`` tokens."""
        prefix = self.encode.start
        body = self.length - len(prefix)
        tokens = itertools.islice(itertools.chain.from_iterable(texts), skipped, None)
        while len(piece := list(itertools.islice(tokens, body))) == body:
            yield prefix + piece

    def _conversations(
        self, corpus: Corpus, seen: set[int], facts: dict[str, Any]
    ) -> Iterator[Row]:
        """Yield one sample per conversation, except those in the splits of a calibration."""
        most = self.longest
        taken: set[tuple[int, ...]] = set()
        for split in self.used.splits.values() if self.used is not None else ():
            taken |= set(map(ids_of, split.rows))
        for text in corpus.documents:
            if not is_new(text, seen):
                continue
            # A few more tokens show whether an answer ends at the limit.
            row = row_of(self.encode, text, most + 1)
            if len(row) > most:
                row = _until_answer(row)
            if not has_prediction(row):
                facts["left_out"] = facts.get("left_out", 0) + 1
            elif ids_of(row) not in taken:
                yield row


def _until_answer(row: Row) -> Row:
    """Return a conversation up to its last answer that is followed by context, perhaps none."""
    ends = (i for i in range(len(row) - 1, 0, -1) if row[i - 1] >= 0 > row[i])
    return row[: next(ends, 0)]


def tokens_of(drawn: Drawn, texts: Sequence[OpenText], pad: int) -> TokenSet:
    """Make a token set of samples, padded with the token ``pad``."""
    names = [texts[i].part.name for i, _ in drawn] if len(texts) > 1 else []
    return TokenSet.from_rows([row for _, row in drawn], pad, names)


def _facts(used: Calibration | None, source: str) -> Mapping[str, Any]:
    """Return a calibration's facts about one source of its text."""
    if used is None:
        return {}
    if is_same_text(used.source, source):
        tokens = sum(int(split.mask.sum()) for split in used.splits.values())
        return {**used.meta, "tokens": tokens}
    parts: Sequence[Mapping[str, Any]] = used.meta.get("parts", ())
    return next((part for part in parts if is_same_text(part["source"], source)), {})


def _tokenise(
    corpus: Corpus,
    encode: Encoder,
    seen: set[int],
    most: int | None,
    facts: dict[str, Any],
) -> Iterator[list[int]]:
    """Yield the tokens of documents not in ``seen``; ``facts`` counts all documents read."""
    facts["documents"] = 0
    for text in corpus.documents:
        if ids := encode(text, most):
            facts["documents"] += 1
            if is_new(text, seen):
                yield ids


def _join(documents: Iterator[list[int]], between: list[int]) -> Iterator[list[int]]:
    for number, ids in enumerate(documents):
        yield (between if number else []) + ids


def left_out(text: OpenText, longest: int) -> str:
    """Say how many conversations have no answer that ends in the longest sample; "" if none."""
    count = text.facts.get("left_out")
    words = (
        f"{count} conversations are longer than {longest} tokens, and their answers end later; "
        "raise --length"
    )
    return words if count else ""


def say_left_out(texts: Sequence[OpenText], longest: int) -> None:
    """Print a line for each source of which conversations are left out."""
    for text in texts:
        if words := left_out(text, longest):
            say(f"isingcut: {text.part.name}: {words} to use them")
