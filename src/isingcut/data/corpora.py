"""Where text comes from: files, `datasets`, and texts that a name alone stands for."""

from __future__ import annotations

import hashlib
import json
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from isingcut.data import held, text_files
from isingcut.data.answers import Render, answered
from isingcut.data.chat_templates import render_chat
from isingcut.data.mixture import name_part, parts_of, place_of, places_in
from isingcut.data.packaged import HUB, PACKAGED
from isingcut.data.text_files import FORMATS, Record, clear_errors, text_file
from isingcut.errors import CalibrationError, ModelError
from isingcut.files.inputs import user_path
from isingcut.files.writing import edges_sha256, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_Value = tuple[str, Any]
_Order = Callable[[Iterator[_Value]], Iterator[_Value]]
_ABSENT = object()
Kind = Literal["text", "documents", "chat"]

_SHUFFLE_BUFFER = 10_000
_DATA_SUFFIXES = {".parquet", ".arrow", ".zst", ".gz", *FORMATS}
_SOURCES = (
    "expected a .txt, .jsonl, .json or .csv file (or one of these as .gz), - for standard input, a "
    "datasets name, 'web', 'instruct', 'maths', 'wiki', 'python', 'self', answers:SOURCE, or a "
    "mixture SOURCE=WEIGHT,SOURCE=WEIGHT"
)


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
    """The corpus behind one source (all but ``"self"``; a mixture's parts one by one).

    Of ``answers:SOURCE`` the documents are `answers.Answered`.

    Raises:
        CalibrationError: missing, unreadable or malformed, or no conversations to count answers of.
    """
    if (place := place_of(source)) != source:
        corpus = _read(place, tokenizer, seed, answers=True)
        if corpus.kind != "chat":
            raise _no_answers(place)
        return corpus
    return _read(source, tokenizer, seed)


def _read(
    source: str, tokenizer: PreTrainedTokenizerBase, seed: int, *, answers: bool = False
) -> Corpus:
    def corpus(name: str, records: Iterator[Record], order: _Order) -> Corpus:
        return _records_corpus(name, records, tokenizer, order, answers=answers)

    shuffled = partial(_shuffled, seed=seed)
    if source in PACKAGED:
        return Corpus(source, "documents", _distinct(_shuffled(PACKAGED[source](), seed)))
    if (texts := held.find(source)) is not None:
        listed = ((f"text {i} of the list", {"text": text}) for i, text in enumerate(texts))
        return corpus(source, listed, shuffled)
    if source in HUB:
        return corpus(source, _dataset(source, seed), lambda rows: rows)
    _check_one(source)
    path, name = user_path(source), _name(source)
    if source == "-" or _is_file(path):
        file = text_file(path, name)
        if file.format == ".txt":
            return Corpus(name, "text", file.pieces())
        return corpus(name, file.records(), shuffled)
    # A hub data set may be huge: its rows arrive shuffled within a buffer instead.
    return corpus(source, _dataset(source, seed), lambda rows: rows)


def _no_answers(place: str) -> CalibrationError:
    return CalibrationError(
        f"{place} holds text and no conversations; 'answers:' counts the assistant's tokens of "
        "records with 'messages': give the source without it"
    )


def check(source: str) -> None:
    """Refuse a source, or a mixture with a part, that cannot be one; reads no text.

    Raises:
        CalibrationError: nothing is there, a folder without data files, or no file of text.
    """
    parts = parts_of(source)
    for part in parts:
        with name_part(part, parts):
            place = place_of(part.source)
            _check_one(place)
            if place != part.source and (place in (*PACKAGED, "self") or held.is_name(place)):
                raise _no_answers(place)


def text_hashes(source: str) -> dict[str, str]:
    """The SHA-256 of each part of a text that is a plain file, by where it is.

    Of a folder, that of its data files' names, sizes and first and last MiB.
    """
    found = {}
    for place in places_in(source):
        path = user_path(place)
        if place in (*PACKAGED, *HUB, "self", "-"):
            continue
        with clear_errors(place):
            if path.is_file():
                found[place] = file_sha256(path)
            elif path.is_dir():
                files = {str(p.relative_to(path)): edges_sha256(p) for p in _data_files(path)}
                found[place] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return found


def refuse_changed(hashes: Mapping[str, str], source: str) -> None:
    """Refuse a text of which a file is not what it was.

    Args:
        hashes: `text_hashes` as they were; a file that is not among them, or is gone, passes.

    Raises:
        CalibrationError: with the file.
    """
    for place, found in text_hashes(source).items():
        if hashes.get(place, found) != found:
            raise CalibrationError(
                f"{place} was changed since it was measured on; put the old text back, or measure "
                "the new one: with another --out, or with --overwrite"
            )


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _DATA_SUFFIXES)


def _check_one(source: str) -> None:
    if not source.strip():
        raise CalibrationError(f"the calibration source is empty; {_SOURCES}")
    if source in (*PACKAGED, *HUB, "self") or held.find(source) is not None:
        return
    path = user_path(source)
    if source == "-" or _is_file(path):
        text_files.check(path, _name(source), _SOURCES)
        return
    named_as_file = path.name.lower().removesuffix(".gz").endswith(FORMATS)
    folder = path if path.is_dir() else Path(source.rpartition(":")[0] or source).expanduser()
    if folder.is_dir():
        if named_as_file or not _data_files(folder):
            raise CalibrationError(f"{source} is a folder without data files; {_SOURCES}")
    elif named_as_file or source.startswith((".", "/", "~")):
        raise CalibrationError(f"there is no calibration file {source!r}; {_SOURCES}")


def _name(source: str) -> str:
    return "standard input" if source == "-" else source


def _is_file(path: Path) -> bool:
    """Whether anything is there that is no folder."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise CalibrationError(f"{str(path)[:200]} cannot be read: {e.strerror}") from e


def _records_corpus(
    source: str,
    records: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    order: _Order,
    *,
    answers: bool,
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
        named = ", ".join(sorted(map(str, fields))) or "nothing"
        raise CalibrationError(f"{where} has neither 'text' nor 'messages' (it has {named})")

    # Only what is used is kept while a whole file is shuffled.
    values = ((place, fields.get(key, _ABSENT)) for place, fields in chain([first], records))

    def texts() -> Iterator[str]:
        render = partial(render_chat, tokenizer)
        for place, value in order(values):
            if value is _ABSENT:
                raise CalibrationError(f"{place} has no {key!r}, which the first record has")
            if key == "text":
                yield _text(place, value)
            else:
                yield _rendered(place, value, render, answers=answers)

    return Corpus(source, "chat" if kind == "chat" else "documents", _distinct(texts()))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: 'text' must be a string, found {type(value).__name__}")
    return _characters(where, value)


def _characters(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise CalibrationError(
            f"{where} holds {text[e.start]!a}, half of a character (a lone surrogate), which no "
            "tokenizer takes; it comes from text that was cut or decoded wrongly: repair or remove "
            "it"
        ) from e
    return text


def _rendered(where: str, messages: Any, render: Render, *, answers: bool) -> str:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    ):
        raise CalibrationError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content'"
        )
    try:
        text = answered(messages, render) if answers else render(messages)
    except ModelError as e:
        raise CalibrationError(f"{where}: {e}") from e
    return _characters(where, text)


def is_new(text: str, seen: set[int]) -> bool:
    """Whether a text with words differs from all ``seen`` in more than white space; it is now."""
    words = " ".join(text.split())
    if not words or hash(words) in seen:
        return False
    seen.add(hash(words))
    return True


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    return (text for text in texts if is_new(text, seen))


def _shuffled(items: Iterable[T], seed: int) -> Iterator[T]:
    everything = list(items)
    random.Random(seed).shuffle(everything)
    yield from everything


def _dataset(source: str, seed: int) -> Iterator[Record]:
    from isingcut.data.hub_datasets import stream

    options: dict[str, Any] = {"seed": seed, "buffer": _SHUFFLE_BUFFER}
    if source in HUB:
        options["advice"] = (
            f"{source!r} stands for it: let this machine reach the hub, or name a text that is "
            "here (a file, 'wiki' or 'python')"
        )
    rows = stream(HUB.get(source, source), **options)
    for number, row in enumerate(rows, start=1):
        yield f"{source} record {number}", row
