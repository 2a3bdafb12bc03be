"""Print text literally, without control characters, in any encoding.

Names of models, folders and tasks come from other people: they are never interpreted as markup, and
their control characters never reach a terminal or a page. A terminal or file whose encoding lacks
``±`` or box characters gets ASCII instead.
"""

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
_PLAIN = str.maketrans(
    {
        "±": "+-",
        "·": ".",
        "×": "x",
        "→": "->",
        "‖": "||",
        "−": "-",
        "–": "-",
        "…": "...",
    }
)


def printable(text: str) -> str:
    """Escape every control character of ``text`` except line ends and tabs.

    Lone surrogates and characters that change the writing direction are escaped too.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


ASCII = "isingcut.ascii"
"""The encoding error handler that replaces missing characters by ASCII."""
codecs.register_error(ASCII, _spell_out)


def say(text: str) -> None:
    """Print a text as one line to standard error; write errors are ignored."""
    with contextlib.suppress(OSError):
        print(
            printable(re.sub(r"\s*\n\s*", " ", text.strip())),
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def convert_write_errors() -> Iterator[None]:
    """Convert write errors of standard output to `InputError`, within the context.

    Raises:
        InputError: standard output cannot be written. A `BrokenPipeError` passes.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        if e.filename is not None:
            raise
        raise InputError(f"cannot write to standard output: {e.strerror}") from e


def prepare() -> None:
    """Make standard output and standard error accept any text.

    A standard stream that the parent process closed is opened on the null device. Otherwise the
    next opened file would get its descriptor, and libraries would print into that file.
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
    """Flush a stream; return the error if that fails, and redirect the stream to the null device.

    Otherwise Python would try again at exit and print its own message.
    """
    try:
        stream.flush()
    except OSError as e:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        return e
    return None
