"""Text becomes token samples: three disjoint splits that build, rank and report.

The split `energy` builds the Hamiltonian, `rank` orders the candidates and `report` gives the
figures that are published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.allocation import (
    ALLOCATION,
    SPLITS,
    Conversations,
    Generated,
    Packed,
    Rows,
    Text,
)
from isingcut.data.corpora import read, text_hashes
from isingcut.data.encoder import Encoder
from isingcut.data.mixture import Part, Turns, naming, parts_of
from isingcut.data.overlap import overlap
from isingcut.data.self_text import generated
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files import documents
from isingcut.files.tensors import read_tensors, tensor_header
from isingcut.files.writing import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
            if not len(ids):
                raise documents.damaged(path, f"{name} has no sample")
            if ids.min(initial=0) < 0:
                raise documents.damaged(path, f"{name}.input_ids holds negative tokens")
            if not (np.sort(mask, axis=1)[:, ::-1] == mask).all() or not mask[:, :1].all():
                raise documents.damaged(path, f"{name}.mask is not a run of real tokens a row")
            counted = arrays.get(f"{name}.counted")
            if counted is not None and ((counted > mask).any() or not counted[:, 1:].any(1).all()):
                raise documents.damaged(path, f"{name}.counted is not of real tokens in each row")
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
        return generated(model, tokenizer, wanted, length, seed, progress)

    def opened(part: Part) -> Text:
        if part.source == "self":
            return Generated(generate, length)
        corpus = read(part.source, tokenizer, seed)
        if corpus.kind == "chat":
            return Conversations(corpus, encode, length, counts, part.share, seen)
        return Packed(corpus, encode, length, seen)

    texts: list[Text] = []
    for part in parts:
        with naming(part, parts):
            texts.append(opened(part))
    order = {
        name: _order(parts, texts, name, counts[name], Turns(parts, length, f"{seed} {name}"))
        for name in ALLOCATION
    }
    rows = []
    for part, text in zip(parts, texts, strict=True):
        with naming(part, parts):
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
        with naming(parts[i], parts):
            turns.took(i, texts[i].take(split))
        found.append(i)
    return found


def _tokens(rows: Rows) -> int:
    return sum(len(row) for split in rows.values() for row in split)
