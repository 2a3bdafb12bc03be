"""What a Python caller hands over where a path is typed: a loaded model, a list of texts.

Each gets a name that stands in the options and in `run.json` where a path would, and that holds
a hash of what it names, so that another list is another source. The thing itself is found under
that name as long as it is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from isingcut.errors import CalibrationError, InputError

_NAME = re.compile(r".* in memory \([0-9a-f]{16}\)")
_held: dict[str, list[Any]] = {}


def is_name(word: str) -> bool:
    """Whether a word is the name of something handed over, held or not."""
    return _NAME.fullmatch(word) is not None


def find(name: str) -> Any:
    """What is held under a name: a folder or a list of texts; None for any other word.

    Raises:
        InputError: a name of that form, of something that is held no more.
    """
    if not is_name(name):
        return None
    if not _held.get(name):
        raise InputError(
            f"{name!r} was handed over in Python and is not kept; hand it over there again, or "
            "write it to disk and give its path"
        )
    return _held[name][-1]


@contextlib.contextmanager
def hold_texts(given: Sequence[str]) -> Iterator[str]:
    """Hold a list of texts; gives its name.

    Raises:
        CalibrationError: no list of strings, or an empty one.
    """
    if not isinstance(given, list | tuple):
        raise CalibrationError(
            f"calibration must be a source's name or a list of texts, got {type(given).__name__}"
        )
    if not given:
        raise CalibrationError("calibration is an empty list; give texts")
    digest = hashlib.sha256()
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration must be a list of strings, but text {number} is of type "
                f"{type(text).__name__}"
            )
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    with hold(f"{len(given)} texts in memory ({digest.hexdigest()[:16]})", list(given)) as name:
        yield name


@contextlib.contextmanager
def hold(name: str, thing: Any) -> Iterator[str]:
    """Hold a thing under a name for as long as the context is open."""
    # A list, because two runs may hold the same thing at a time.
    _held.setdefault(name, []).append(thing)
    try:
        yield name
    finally:
        _held[name].pop()
