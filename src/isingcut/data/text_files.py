"""Read texts and records from files and pipes: .txt, .jsonl, .json and .csv, each also as .gz.

The size of a record is limited. A pipe has no file name: it is read as JSON lines if it begins with
``{``, else as text; gzip is detected by its magic number.
"""

import codecs
import csv
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from isingcut.data.mixture import FORMATS, is_object_name, places_in
from isingcut.errors import CalibrationError, IsingcutError, one_line
from isingcut.files.inputs import SMALL, parse_json, user_path

Record = tuple[str, dict[str, Any]]
"""The location of a record (file and line), for messages, and its fields."""

RECORD = SMALL
"""Largest size of one record, and of a whole .json, in bytes."""
_PIECE = 1 << 16
LONGEST = 1 << 20
"""Maximum number of characters to tokenize at a time."""

_NEAR = 1 << 16
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")


def cut(text: str) -> int:
    """Return where to split a partial text: at the last white space near its end, or at its end."""
    tail = max(1, len(text) - _NEAR)
    space = _LAST_SPACE.search(text, tail)
    return space.start() if space else len(text)


def read_text(path: Path, name: str) -> Generator[Any, None, None]:
    """Open a file or a pipe, after `check`; yield its format, then its content lazily.

    The content is `Record`s, or for ``.txt`` pieces of a running text.

    Args:
        name: the name in messages.

    Raises:
        CalibrationError: the file cannot be opened or read, or its content is malformed.
    """
    suffix, packed = _kind(path)
    known = suffix in FORMATS
    with clear_errors(name), ExitStack() as opened:
        source = 0 if str(path) == "-" else path
        stream: io.BufferedReader = opened.enter_context(
            open(source, "rb", closefd=source != 0)
        )
        if packed or (not known and stream.peek(1).startswith(b"\x1f")):
            unpacked: Any = gzip.GzipFile(fileobj=stream)
            stream = opened.enter_context(io.BufferedReader(unpacked))
        if not known:
            begin = stream.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
            suffix = ".jsonl" if begin.startswith(b"{") else ".txt"
        yield suffix
        readers: dict[str, Callable[[BinaryIO, str], Iterator[Any]]]
        readers = {
            ".txt": _pieces,
            ".jsonl": json_lines,
            ".json": _json_items,
            ".csv": _csv_rows,
        }
        yield from readers[suffix](stream, name)


def _decode(file: BinaryIO) -> io.TextIOWrapper:
    # Line ends are not translated, because measurements use the text unchanged.
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _refuse_binary(text: str, name: str) -> None:
    if "\0" in text:
        raise CalibrationError(
            f"{name} contains NUL bytes: it is UTF-16 or not text; save it as UTF-8 text"
        )


def _pieces(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield a running text in pieces of whole lines; very long lines are split at white space."""
    piece = ""
    with _decode(file) as lines:
        while line := lines.readline(LONGEST):
            _refuse_binary(line, name)
            piece += line
            if len(line) == LONGEST and line[-1] not in "\r\n":
                end = cut(piece)
                yield piece[:end]
                piece = piece[end:]
            elif len(piece) > _PIECE:
                yield piece
                piece = ""
    if piece:
        yield piece


def json_lines(
    file: BinaryIO, name: str, error: type[IsingcutError] = CalibrationError
) -> Iterator[Record]:
    """Yield the objects in JSON lines; skip blank lines.

    Args:
        name: the file's name in messages.
        error: class of the error to raise.
    """
    number = 0
    while raw := file.readline(RECORD + 1):
        number += 1
        where = f"{name} line {number}"
        if len(raw) > RECORD:
            raise error(
                f"{where} is longer than {RECORD} bytes; expected one record per line"
            )
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            record = parse_json(line) if line else {}
        except UnicodeDecodeError as e:
            raise error(f"{where} is not UTF-8; save the file as UTF-8") from e
        except ValueError as e:
            raise error(f"{where} is not valid JSON: {one_line(e)}") from e
        if not isinstance(record, dict):
            raise error(f"{where} must be a JSON object, found {type(record).__name__}")
        if line:
            yield where, record


def _json_items(file: BinaryIO, name: str) -> Iterator[Record]:
    content = file.read(RECORD + 1)
    if len(content) > RECORD:
        raise CalibrationError(
            f"{name} has more than {RECORD} bytes; save it as .jsonl, one record per line"
        )
    try:
        items = parse_json(content)
    except ValueError as e:
        raise CalibrationError(f"{name} is not valid JSON: {one_line(e)}") from e
    if not isinstance(items, list):
        raise CalibrationError(
            f"{name} must be a list of texts or of records with 'text' or 'messages', "
            f"found {type(items).__name__}"
        )
    for number, item in enumerate(items):
        where = f"{name} item {number}"
        if not isinstance(item, str | dict):
            raise CalibrationError(
                f"{where} must be a text, or an object with 'text' or 'messages', "
                f"found {type(item).__name__}"
            )
        yield where, {"text": item} if isinstance(item, str) else item


def _csv_rows(file: BinaryIO, name: str) -> Iterator[Record]:
    # The default limit of the csv module is 128 KiB.
    csv.field_size_limit(RECORD)
    with _decode(file) as lines:
        rows = csv.reader(lines, strict=True)
        try:
            header = [column.strip() for column in next(rows, [])]
            alone = len(header) == 1 and not any(mark in header[0] for mark in ";\t|")
            if header.count("text") != 1 and not alone:
                columns = ", ".join(header)[:200] or "nothing"
                raise CalibrationError(
                    f"{name} must have a column 'text', or one column; its first line has "
                    f"{columns} (columns are separated by commas)"
                )
            column = header.index("text") if "text" in header else 0
            for row in filter(None, rows):
                where = f"{name} line {rows.line_num}"
                if len(row) != len(header):
                    raise CalibrationError(
                        f"{where} has {len(row)} fields, but the first line has {len(header)} "
                        "columns; put texts with commas in quotes"
                    )
                _refuse_binary(row[column], name)
                yield where, {"text": row[column]}
        except csv.Error as e:
            raise CalibrationError(
                f"{name} line {rows.line_num} is not valid CSV: {one_line(e)}"
            ) from e


def is_read_once(source: str) -> bool:
    """Whether a source is a pipe, which can be read only once."""
    if source == "-":
        return True
    path = user_path(source)
    return path.exists() and not (path.is_file() or path.is_dir())


def is_read_again(source: str) -> bool:
    """Whether another command can read a text or a mixture that a run has read."""
    return not any(
        place == "self" or is_object_name(place) or is_read_once(place)
        for place in places_in(source)
    )


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Convert reading errors to one-line errors with the name and the reason."""
    try:
        yield
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"{name} is not UTF-8 (invalid byte {e.object[e.start]:#04x}); save it as UTF-8"
        ) from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise CalibrationError(
            f"{name} is not a complete gzip file ({one_line(e)}); compress it again"
        ) from e
    except OSError as e:
        raise CalibrationError(
            f"cannot read {name}: {e.strerror or one_line(e)}"
        ) from e


def check(path: Path, name: str, advice: str) -> None:
    """Check that a path is a file or pipe of text, without reading it.

    Args:
        path: an existing path that is not a folder; ``-`` is standard input.
        name: the name in messages.
        advice: end of the message about an unknown format: what to give instead.

    Raises:
        CalibrationError: an unknown format, a device or a terminal.
    """
    typed = str(path)
    with clear_errors(name):
        mode = os.fstat(0).st_mode if typed == "-" else path.stat().st_mode
        terminal = typed == "-" and os.isatty(0)
    if terminal:
        raise CalibrationError(
            "standard input is a terminal; pipe a text into it, for example: "
            "cat my-text.txt | isingcut ... --calibration -"
        )
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise CalibrationError(f"{name} is a device; expected a file or a pipe")
    suffix, packed = _kind(path)
    nameless = typed == "-" or typed.startswith(("/dev/", "/proc/"))
    if stat.S_ISREG(mode) and not (suffix in FORMATS or packed or nameless):
        raise CalibrationError(f"{name} is not one of {', '.join(FORMATS)}; {advice}")


def _kind(path: Path) -> tuple[str, bool]:
    """Return the format of a file name, and whether it is compressed."""
    words = path.name.lower()
    return Path(words.removesuffix(".gz")).suffix, words.endswith(".gz")
