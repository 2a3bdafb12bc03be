"""Text becomes token samples: three disjoint splits that build, rank and report.

The split `energy` builds the Hamiltonian, `rank` orders the candidates and `report` gives the
figures that are published. Tokens are given out in the order report, rank, energy, so the
reported text stays the same when the energy is measured on more samples.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.corpora import Corpus, read
from isingcut.data.encoder import Encoder
from isingcut.data.self_text import generated
from isingcut.data.tokens import TokenSet, distinct
from isingcut.errors import CalibrationError, InputError
from isingcut.files import documents
from isingcut.files.tensors import read_tensors, tensor_header
from isingcut.files.writing import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SPLITS", "Calibration", "TokenSet", "build"]

SPLITS = ("energy", "rank", "report")
_ALLOCATION = ("report", "rank", "energy")
_KIND = "calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The three splits of one calibration text, and what they were made from.

    Args:
        splits: ``"energy"``, ``"rank"`` and ``"report"``.
        source: what the user asked for.
        meta: how it was made (kind of source, seed, length, documents used), JSON-able.
    """

    splits: Mapping[str, TokenSet]
    source: str
    meta: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the tokens and masks of all splits."""
        digest = hashlib.sha256()
        for name in SPLITS:
            tokens = self.splits[name]
            digest.update(f"{name}:{tuple(tokens.input_ids.shape)}".encode())
            digest.update(np.ascontiguousarray(tokens.input_ids.numpy()).tobytes())
            digest.update(np.ascontiguousarray(tokens.mask.numpy()).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save

        tensors = {}
        for name, tokens in self.splits.items():
            tensors[f"{name}.input_ids"] = tokens.input_ids.contiguous()
            tensors[f"{name}.mask"] = tokens.mask.contiguous()
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
            if not len(ids):
                raise documents.damaged(path, f"{name} has no sample")
            if ids.min(initial=0) < 0:
                raise documents.damaged(path, f"{name}.input_ids holds negative tokens")
            if not (np.sort(mask, axis=1)[:, ::-1] == mask).all() or not mask[:, :1].all():
                raise documents.damaged(path, f"{name}.mask is not a run of real tokens a row")
            splits[name] = TokenSet(
                torch.from_numpy(ids), torch.from_numpy(mask), torch.arange(len(ids))
            )
        loaded = cls(splits, header["source"], header["meta"])
        if loaded.sha256 != header["sha256"]:
            raise documents.damaged(path, "its tokens do not match its own hash")
        return loaded


def _wanted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in a file: both arrays of a split are (samples, length)."""
    wanted = {}
    for name in SPLITS:
        shape = (*shapes.get(f"{name}.input_ids", ()), 1, 1)[:2]
        wanted[f"{name}.input_ids"], wanted[f"{name}.mask"] = ("I64", shape), ("BOOL", shape)
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
    """Token samples from a text source.

    Plain text is packed: samples of exactly ``length`` tokens, no padding, each starting with
    the tokenizer's beginning-of-sequence token where it sets one. Conversations are one sample
    each, cut at ``length``. No document (nor its duplicate) is in two splits; text that is one
    document is divided into consecutive ranges instead.

    Args:
        source: a file or pipe (`text_files`), ``"-"``, a `datasets` name or folder, a name of
            `held`, ``"wiki"`` or ``"self"``.
        samples, rank_samples, report_samples: samples in the splits energy, rank and report.
        length: tokens per sample, at least 2.
        seed: order of the documents, and the sampling of ``"self"``.
        model: its embedding bounds the token ids; the source ``"self"`` samples from it.
        progress: shown while ``"self"`` generates.

    Raises:
        CalibrationError: unreadable, malformed or too short, in one line.
        MissingExtraError: a `datasets` name without that package.
        InputError: a sample count or length that is too small.
    """
    counts = {"report": report_samples, "rank": rank_samples, "energy": samples}
    for name, value in {**counts, "length": length - 1}.items():
        if value < 1:
            raise InputError(f"calibration needs at least one {name} sample of two tokens")
    meta: dict[str, Any] = {"seed": seed, "length": length}
    encode = Encoder(tokenizer, model)
    if source == "self":
        if model is None:
            raise InputError("the calibration source 'self' needs the model to sample from")
        rows = generated(model, tokenizer, counts, length, seed, progress)
        meta["kind"] = "generated"
    else:
        corpus = read(source, tokenizer, seed)
        meta["kind"] = corpus.kind
        if corpus.kind == "chat":
            rows = _conversations(corpus, encode, counts, length)
        else:
            rows = _packed(corpus, encode, counts, length, meta)
    splits = {name: TokenSet.from_rows(rows[name], encode.pad) for name in SPLITS}
    return Calibration(splits, source, meta)


def _conversations(
    corpus: Corpus, encode: Encoder, counts: Mapping[str, int], length: int
) -> dict[str, list[list[int]]]:
    """One sample per conversation; those that agree in all their kept tokens count once."""
    stream = distinct(encode(text, length) for text in corpus.documents)
    rows = {name: list(islice(stream, counts[name])) for name in _ALLOCATION}
    found, needed = [len(row) for split in rows.values() for row in split], sum(counts.values())
    if len(found) < needed:
        raise CalibrationError(
            f"{corpus.name} is too short: {_words(counts)} samples need {needed} different "
            f"conversations of up to {length} tokens, found {len(found)} "
            f"({sum(found)} tokens); give more, or lower --samples, --rank-samples or "
            "--report-samples"
        )
    return rows


def _packed(
    corpus: Corpus,
    encode: Encoder,
    counts: Mapping[str, int],
    length: int,
    meta: dict[str, Any],
) -> dict[str, list[list[int]]]:
    """Full-length samples out of running text or of concatenated documents."""
    prefix = encode.start
    body = length - len(prefix)
    needs = {name: counts[name] * body for name in _ALLOCATION}
    # No sample uses more of one document than all samples together need.
    most = sum(needs.values())
    documents: list[list[int]] = []

    def tokenised() -> Iterator[list[int]]:
        for text in corpus.documents:
            if ids := encode(text, most):
                documents.append(ids)
                yield ids

    streams = None
    if corpus.kind == "documents":
        streams = _by_document(tokenised(), needs, encode.separator)
    # Running text, and one or two documents, which cannot fill three splits.
    if streams is None and len(documents) < len(needs):
        streams = _by_range(itertools.chain(list(documents), tokenised()), needs)
    if streams is None:
        raise CalibrationError(_too_short(corpus, documents, counts, length, most))
    if corpus.kind == "documents":
        meta["documents"] = len(documents)
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
