"""What is printed: taken literally, safe to show, and legible in any encoding.

Names of models, folders and tasks come from others: nothing in them is markup, and no control
character of theirs reaches a terminal or a page. A terminal or file that knows no ``±`` and no
box characters gets them in ASCII.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from isingcut.errors import InputError

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_PLAIN = {"±": "+-", "·": ".", "×": "x", "→": "->", "‖": "||", "−": "-", "–": "-", "…": "..."}


def printable(text: str) -> str:
    """``text`` with every control character but line ends and tabs spelled out.

    So are halves of surrogate pairs and what turns the direction of writing.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """``text`` without control characters, on one line."""
    return printable(re.sub(r"\s*\n\s*", " ", text.strip()))


def _in_ascii(character: str) -> str:
    if "\u2500" <= character <= "\u257f":
        return {"─": "-", "━": "-", "│": "|", "┃": "|"}.get(character, "+")
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


ASCII = "isingcut.ascii"
"""The error handler of encodings that spells in ASCII what an encoding does not have."""
codecs.register_error(ASCII, _spelled)


def say(line: str) -> None:
    """One line on standard error; where that cannot be written, nobody can be told."""
    with contextlib.suppress(OSError):
        print(one_line(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Around what prints results.

    Raises:
        InputError: standard output cannot be written. Where it is only that nobody reads on, the
            `BrokenPipeError` goes through.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        if e.filename is not None:
            raise
        raise InputError(f"standard output cannot be written: {e.strerror}") from e


def prepare() -> None:
    """Make standard streams that take every text.

    A descriptor that was closed by whoever started the process is opened on nothing: the next
    file opened would get its number, and what a library prints would go into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ASCII)


def unwritable(stream: TextIO) -> OSError | None:
    """Why what was printed does not arrive; the stream is then turned to nothing.

    Otherwise Python would try again at its end, and say so in its own way.
    """
    try:
        stream.flush()
    except OSError as e:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        return e
    return None
