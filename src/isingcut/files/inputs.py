"""Read user files within limits: regular files of a bounded size, in UTF-8.

A device, a pipe or a folder instead of a file, a file without an end, and JSON nested too deeply
each raise one clear error, of the class that the caller chooses.
"""

import codecs
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from isingcut.errors import InputError, IsingcutError

SMALL = 64 * 2**20
"""Largest size in bytes of a configuration, a list or a results file."""
_KINDS = {"d": "a folder", "p": "a pipe", "c": "a device", "b": "a device"}


def user_path(text: str | os.PathLike[str]) -> Path:
    """Convert a typed path to a `Path`, with ``~`` replaced by the home folder.

    Raises:
        InputError: not a path (None, a NUL byte), or an unknown home folder.
    """
    if not isinstance(text, str | os.PathLike):
        raise InputError(
            f"expected a path, got {text!r:.60}; give a str or a pathlib.Path"
        )
    typed = os.fspath(text)
    if "\0" in typed:
        raise InputError(f"{typed!r} is not a path: it contains a NUL byte")
    try:
        return Path(typed).expanduser()
    except RuntimeError as e:
        raise InputError(
            f"{typed}: no home folder of that name; give a full path"
        ) from e


def regular_file(
    path: Path,
    what: str,
    error: type[IsingcutError],
    *,
    limit: float = math.inf,
) -> None:
    """Raise if a path is not a regular file (links are followed).

    Args:
        what: description of the file in messages, for example ``"the config file"``.
        error: class of the error to raise.
        limit: largest size in bytes.

    Raises:
        error: the file does not exist, is not regular, is larger than ``limit``, or is not
            accessible.
    """
    try:
        state = path.stat()
    except FileNotFoundError as e:
        gone = "is a broken link" if path.is_symlink() else "does not exist"
        raise error(f"{what} {path} {gone}; expected a file") from e
    except (OSError, ValueError) as e:
        raise error(f"{what} {path} cannot be read: {_reason(e)}") from e
    if not stat.S_ISREG(state.st_mode):
        kind = _KINDS.get(stat.filemode(state.st_mode)[0], "not a regular file")
        raise error(f"{what} {path} is {kind}; expected a regular file")
    if state.st_size > limit:
        raise error(
            f"{what} {path} has {state.st_size} bytes; expected at most {limit}"
        )


def read_bytes(
    path: Path,
    what: str,
    error: type[IsingcutError] = InputError,
    *,
    limit: int = SMALL,
) -> bytes:
    """Read a regular file of at most ``limit`` bytes; errors as `regular_file`."""
    regular_file(path, what, error, limit=limit)
    try:
        with path.open("rb") as f:
            content = f.read(limit + 1)
    except OSError as e:
        raise error(f"{what} {path} cannot be read: {_reason(e)}") from e
    if len(content) > limit:
        raise error(
            f"{what} {path} has more than {limit} bytes; expected at most {limit}"
        )
    return content


def read_text(path: Path, what: str, *, limit: int = SMALL) -> str:
    """Read a regular UTF-8 file.

    Raises:
        InputError: as `regular_file`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, what, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{what} {path} is not UTF-8 (byte {e.start}); convert it to UTF-8"
        ) from e


def load_json(
    path: Path,
    what: str,
    error: type[IsingcutError] = InputError,
    *,
    infinite: bool = False,
) -> Any:
    """Read the JSON value in a regular UTF-8 file.

    Args:
        infinite: as in `parse_json`.

    Raises:
        error: as `regular_file`; or not JSON, or nested deeper than 200.
    """
    content = read_bytes(path, what, error)
    try:
        return parse_json(content, infinite=infinite)
    except ValueError as e:
        raise error(f"{what} {path} is not readable as JSON ({e})") from e


def parse_json(content: bytes | str, *, infinite: bool = False) -> Any:
    """Parse a JSON value.

    Args:
        infinite: whether to accept Infinity, which configurations of published models contain.

    Raises:
        ValueError: not JSON or not UTF-8, an infinite number, or nested deeper than 200.
    """
    if isinstance(content, bytes):
        content = content.removeprefix(codecs.BOM_UTF8)
    value = from_json(content, allow_inf_nan=infinite)
    if not infinite:
        # Raises for a number such as 1e999, which is read as infinity.
        json.dumps(value, allow_nan=False)
    return value


def find_surrogate(text: str) -> str:
    """Describe a lone surrogate, which no tokenizer accepts; empty if the text has none."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"{text[e.start]!a}, a lone surrogate (half of a character)"
    return ""


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
