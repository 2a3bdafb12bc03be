"""What a user names on disk, read within bounds: a plain file, of a sane size, in UTF-8.

A device, a pipe or a folder where a file is expected, a file that never ends, JSON nested too
deeply for any reader: each is one clear error of the kind the caller gives.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, IsingcutError

SMALL = 64 * 2**20
"""Bytes that a configuration, a list or a results file may have at most."""

_DEEPEST = 200


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as it was typed, with ``~`` for the home folder.

    Raises:
        InputError: no path at all (None, a NUL byte), or no such user's home folder.
    """
    if not isinstance(text, str | os.PathLike):
        raise InputError(f"expected a path, got {text!r:.60}; give a text or a pathlib.Path")
    typed = os.fspath(text)
    if "\0" in typed:
        raise InputError(f"{typed!r} is no path: it holds a NUL byte")
    try:
        return Path(typed).expanduser()
    except RuntimeError as e:
        raise InputError(f"{typed}: there is no such user's home folder; give a full path") from e


def regular_file(
    path: Path, what: str, error: type[IsingcutError] = InputError, *, limit: int | None = None
) -> os.stat_result:
    """The status of a plain file (links are followed).

    Args:
        what: what messages call it, for example ``"the config file"``.
        error: the kind of error that is raised.
        limit: bytes that it may have at most.

    Raises:
        error: not there, no plain file, larger than ``limit``, or not to be looked at.
    """
    try:
        found = path.stat()
    except FileNotFoundError as e:
        gone = "is a link to nothing" if path.is_symlink() else "is not there"
        raise error(f"{what} {path} {gone}; expected a file") from e
    except (OSError, ValueError) as e:
        raise error(f"{what} {path} cannot be read: {_reason(e)}") from e
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{what} {path} is {_named(found.st_mode)}; expected a plain file")
    if limit is not None and found.st_size > limit:
        raise error(f"{what} {path} has {found.st_size} bytes; expected at most {limit}")
    return found


def read_bytes(
    path: Path, what: str, error: type[IsingcutError] = InputError, *, limit: int = SMALL
) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes; errors as `regular_file`."""
    regular_file(path, what, error, limit=limit)
    try:
        with path.open("rb") as f:
            content = f.read(limit + 1)
    except OSError as e:
        raise error(f"{what} {path} cannot be read: {_reason(e)}") from e
    if len(content) > limit:
        raise error(f"{what} {path} has more than {limit} bytes; expected at most that")
    return content


def read_text(path: Path, what: str, *, limit: int = SMALL) -> str:
    """The text of a plain UTF-8 file.

    Raises:
        InputError: as `regular_file`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, what, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{what} {path} is not UTF-8 text (byte {e.start}); convert it") from e


def load_json(
    path: Path, what: str, error: type[IsingcutError] = InputError, *, infinite: bool = False
) -> Any:
    """The JSON value in a plain UTF-8 file.

    Args:
        infinite: as in `parse_json`.

    Raises:
        error: as `regular_file`; not JSON, a name twice in one object, or nested deeper than 200.
    """
    content = read_bytes(path, what, error)
    try:
        return parse_json(content, infinite=infinite)
    except ValueError as e:
        raise error(f"{what} {path} is not readable as JSON ({e})") from e


def parse_json(content: bytes | str, *, infinite: bool = False) -> Any:
    """A JSON value; what Python reads beyond the standard (NaN, names twice) is refused too.

    Args:
        infinite: let Infinity pass, which configurations of published models hold.

    Raises:
        ValueError: not JSON or not UTF-8, a name twice in one object, nested deeper than 200.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        constant = _infinite if infinite else _no_constant
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=constant, parse_float=_float
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    _refuse_deep(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for k, n in enumerate(names) if n in names[:k])
        raise ValueError(f"the name {twice!r} appears twice")
    return out


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _infinite(word: str) -> float:
    return _no_constant(word) if word == "NaN" else float(word)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is larger than any number here")
    return value


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _named(mode: int) -> str:
    kinds = {"d": "a folder", "p": "a pipe", "c": "a device", "b": "a device", "s": "a socket"}
    return kinds.get(stat.filemode(mode)[0], "no plain file")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
