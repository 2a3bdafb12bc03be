"""Text becomes token samples: three disjoint splits that build, rank and report.

The split `energy` builds the Hamiltonian, `rank` orders the candidates and `report` gives the
figures that are published. No document (nor its duplicate) is in two of them. Tokens are given out
in the order report, rank, energy, so the reported text stays the same when the energy is measured
on more samples.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.answers import row_of
from isingcut.data.corpora import Corpus, is_new, read, text_hashes
from isingcut.data.encoder import Encoder
from isingcut.data.generation import sample_from_model
from isingcut.data.mixture import Part, Turns, name_part, parts_of
from isingcut.data.overlap import overlap
from isingcut.data.tokens import Row, TokenSet, count_tokens, distinct
from isingcut.errors import CalibrationError, InputError
from isingcut.files import documents
from isingcut.files.writing import atomic_file, read_tensors, tensor_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS = ("energy", "rank", "report")
ALLOCATION = ("report", "rank", "energy")

Rows = dict[str, list[Row]]


class Text(ABC):
    """One text, from which samples of full length are counted first and made at the end.

    Attributes:
        facts: what is known of it, JSON-able.
    """

    def __init__(self, kind: str, length: int) -> None:
        self.facts: dict[str, Any] = {"kind": kind}
        self._length = length
        self._counts = dict.fromkeys(ALLOCATION, 0)

    def take(self, split: str) -> int:
        """Ask for one more sample of a split, in the order of `ALLOCATION`; gives the number of its
        tokens that count.

        Raises:
            CalibrationError: too short, if that is known by now.
        """
        self._counts[split] += 1
        return self._length

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
        super().__init__(corpus.kind, length)
        self._name, self._wanted, self._share = corpus.name, counts, share
        self._rows: Rows = {name: [] for name in ALLOCATION}
        self._stream = distinct(
            row_of(encode, text, length) for text in corpus.documents if is_new(text, seen)
        )

    def take(self, split: str) -> int:
        row = next(self._stream, None)
        if row is None:
            raise CalibrationError(self._too_short())
        self._rows[split].append(row)
        return count_tokens(row)

    def rows(self) -> Rows:
        return self._rows

    def _too_short(self) -> str:
        found = [len(row) for split in self._rows.values() for row in split]
        needed = f"{sum(self._wanted.values())} different conversations"
        if self._share < 1:
            needed = f"{self._share:.0%} of their tokens from different conversations"
        return (
            f"{self._name} is too short: {_words(self._wanted)} samples need {needed} of up to "
            f"{self._length} tokens, found {len(found)} ({sum(found)} tokens); give more, or "
            "lower --samples, --rank-samples or --report-samples"
        )


class Generated(Text):
    """Text of the model's own.

    Args:
        make: rows for counts by split.
    """

    def __init__(self, make: Callable[[Mapping[str, int]], Rows], length: int) -> None:
        super().__init__("generated", length)
        self._make = make

    def rows(self) -> Rows:
        return self._make(self._counts)


class Packed(Text):
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


__all__ = ["SPLITS", "Calibration", "TokenSet", "build"]

_KIND = "calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The three splits of one calibration text, and what they were made from.

    Args:
        splits: ``"energy"``, ``"rank"`` and ``"report"``.
        source: what the user asked for.
        meta: how it was made (kind of source, seed, length, documents used, overlap of the splits),
            JSON-able.
    """

    splits: Mapping[str, TokenSet]
    source: str
    meta: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the tokens of all splits, which are real, and which count."""
        digest = hashlib.sha256()
        for name in SPLITS:
            tokens = self.splits[name]
            digest.update(f"{name}:{tuple(tokens.input_ids.shape)}".encode())
            digest.update(np.ascontiguousarray(tokens.input_ids.numpy()).tobytes())
            digest.update(np.ascontiguousarray(tokens.mask.numpy()).tobytes())
            if tokens.counted is not None:
                digest.update(b"counted" + np.ascontiguousarray(tokens.counted.numpy()).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save

        tensors = {}
        for name, tokens in self.splits.items():
            tensors[f"{name}.input_ids"] = tokens.input_ids.contiguous()
            tensors[f"{name}.mask"] = tokens.mask.contiguous()
            if tokens.counted is not None:
                tensors[f"{name}.counted"] = tokens.counted.contiguous()
        header = {
            "format": f"isingcut-{_KIND}",
            "version": 1,
            "source": self.source,
            "sha256": self.sha256,
            "meta": dict(self.meta),
        }
        with atomic_file(path) as temporary:
            # Not the library's own writing, whose errors are not the operating system's.
            temporary.write_bytes(save(tensors, tensor_header(header)))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            StageFileError: missing, damaged, not a calibration file, or of a newer version.
        """
        header, arrays = read_tensors(path, _KIND, _wanted)
        splits = {}
        for name in SPLITS:
            ids, mask = arrays[f"{name}.input_ids"], arrays[f"{name}.mask"]
            counted = arrays.get(f"{name}.counted")
            splits[name] = TokenSet(
                torch.from_numpy(ids),
                torch.from_numpy(mask),
                torch.arange(len(ids)),
                _part_names(path, header["meta"], name, len(ids)),
                None if counted is None else torch.from_numpy(counted),
            )
        loaded = cls(splits, header["source"], header["meta"])
        if loaded.sha256 != header["sha256"]:
            raise documents.damaged(path, "its tokens do not match its own hash")
        return loaded


def _part_names(path: Path, meta: Any, split: str, samples: int) -> tuple[str, ...]:
    """The part that each sample of a split is from; nothing where the text is one."""
    if "parts" not in meta:
        return ()
    try:
        names = [str(part["name"]) for part in meta["parts"]]
        found = meta["part_of_sample"][split]
        if len(found) == samples and all(type(i) is int and i >= 0 for i in found):
            return tuple(names[i] for i in found)
    except (LookupError, TypeError):
        pass
    raise documents.damaged(path, f"its samples of {split} are not each of a part of the mixture")


def _wanted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in a file: all arrays of a split are (samples, length)."""
    wanted = {}
    for name in SPLITS:
        shape = (*shapes.get(f"{name}.input_ids", ()), 1, 1)[:2]
        wanted[f"{name}.input_ids"], wanted[f"{name}.mask"] = ("I64", shape), ("BOOL", shape)
        if f"{name}.counted" in shapes:
            wanted[f"{name}.counted"] = ("BOOL", shape)
    return wanted


def build(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    rank_samples: int,
    report_samples: int,
    length: int,
    seed: int,
    model: PreTrainedModel | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Token samples from a text source, or from a mixture of several.

    Plain text is packed: samples of exactly ``length`` tokens, no padding, each starting with
    the tokenizer's beginning-of-sequence token where it sets one. Conversations are one sample
    each, cut at ``length``. No document (nor its duplicate) is in two splits; text that is one
    document is divided into consecutive ranges instead. Every split, and every beginning of one,
    holds the parts of a mixture by their shares of tokens, each at least once.

    Args:
        source: a file or pipe (`text_files`), ``"-"``, a `datasets` name or folder, a name of
            `held` or `packaged`, or ``"self"``; ``"answers:"`` and a source of conversations; or a
            `mixture` of these.
        samples, rank_samples, report_samples: samples in the splits energy, rank and report.
        length: tokens per sample, at least 2.
        seed: order of the documents, and the sampling of ``"self"``.
        model: its embedding bounds the token ids; the source ``"self"`` samples from it.
        progress: shown while ``"self"`` generates.

    Raises:
        CalibrationError: unreadable, malformed or too short, in one line.
        InputError: a sample count or length that is too small.
    """
    counts = {"report": report_samples, "rank": rank_samples, "energy": samples}
    parts = parts_of(source)
    for name, value in {**counts, "length": length - 1}.items():
        if value < 1:
            raise InputError(f"calibration needs at least one {name} sample of two tokens")
        if value < len(parts) and name in counts:
            raise InputError(
                f"a mixture of {len(parts)} texts needs as many {name} samples, got {value}; "
                "raise --samples, --rank-samples or --report-samples"
            )
    # Before it is read: what is changed meanwhile is noticed by whoever reads on.
    hashes = text_hashes(source)
    encode = Encoder(tokenizer, model)
    seen: set[int] = set()

    def generate(wanted: Mapping[str, int]) -> Rows:
        if model is None:
            raise InputError("the calibration source 'self' needs the model to sample from")
        return sample_from_model(model, tokenizer, wanted, length, seed, progress)

    def opened(part: Part) -> Text:
        if part.source == "self":
            return Generated(generate, length)
        corpus = read(part.source, tokenizer, seed)
        if corpus.kind == "chat":
            return Conversations(corpus, encode, length, counts, part.share, seen)
        return Packed(corpus, encode, length, seen)

    texts: list[Text] = []
    for part in parts:
        with name_part(part, parts):
            texts.append(opened(part))
    order = {
        name: _order(parts, texts, name, counts[name], Turns(parts, length, f"{seed} {name}"))
        for name in ALLOCATION
    }
    rows = []
    for part, text in zip(parts, texts, strict=True):
        with name_part(part, parts):
            rows.append(text.rows())
    splits = {}
    for name in SPLITS:
        left_over = [iter(of_part[name]) for of_part in rows]
        names = [parts[i].name for i in order[name]] if len(parts) > 1 else []
        samples_of = [next(left_over[i]) for i in order[name]]
        splits[name] = TokenSet.from_rows(samples_of, encode.pad, names)
    energy, rank, report = (splits[name] for name in SPLITS)
    shared = {"rank": overlap(rank, [energy]), "report": overlap(report, [energy, rank])}
    meta: dict[str, Any] = {"seed": seed, "length": length, "texts": hashes, "overlap": shared}
    if len(parts) == 1:
        meta |= texts[0].facts
    else:
        meta["kind"] = "mixture"
        meta["parts"] = [
            {**vars(part), **text.facts, "tokens": _tokens(of_part)}
            for part, text, of_part in zip(parts, texts, rows, strict=True)
        ]
        meta["part_of_sample"] = order
    return Calibration(splits, source, meta)


def _order(
    parts: Sequence[Part], texts: Sequence[Text], split: str, samples: int, turns: Turns
) -> list[int]:
    """The part that each sample of a split is of; conversations, whose lengths decide, are read."""
    found = []
    for left in range(samples, 0, -1):
        i = turns.next(left)
        with name_part(parts[i], parts):
            turns.took(i, texts[i].take(split))
        found.append(i)
    return found


def _tokens(rows: Rows) -> int:
    return sum(len(row) for split in rows.values() for row in split)
