"""Names of texts: mixtures ``SOURCE=WEIGHT,SOURCE=WEIGHT``, ``answers:SOURCE``,
objects passed in Python, and files of installed packages.

A model or a list of texts that a Python caller passes gets a name with a hash of its content. This
name replaces a path in the options and in `run.json`; the object is found by it during the call.
"""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.errors import CalibrationError, InputError, IsingcutError
from isingcut.files.inputs import user_path

FORMATS = (".txt", ".jsonl", ".json", ".csv")
"""Endings of text files; each may be compressed, with `.gz`."""
_NAME = re.compile(r".* in memory \([0-9a-f]{16}\)")
_objects: dict[str, list[Any]] = {}


def has_format(path: Path) -> bool:
    """Whether a file name has the ending of one of `FORMATS`, compressed or not."""
    return path.name.lower().removesuffix(".gz").endswith(FORMATS)


def is_object_name(word: str) -> bool:
    """Whether a word is the name of an object passed in Python, which may no longer exist."""
    return _NAME.fullmatch(word) is not None


def find_object(name: str) -> Any:
    """Return the object with a name: a folder or a list of texts; None for any other word.

    Raises:
        InputError: the name is that of an object that no longer exists.
    """
    if not is_object_name(name):
        return None
    if not _objects.get(name):
        raise InputError(
            f"{name!r} was passed in Python and is not kept; pass it again, or save it to disk and "
            "give its path"
        )
    return _objects[name][-1]


@contextlib.contextmanager
def register_texts(given: Sequence[str]) -> Iterator[str]:
    """Register a list of texts within the context; yield its name.

    Raises:
        CalibrationError: ``given`` is not a list of strings, or is empty.
    """
    texts = given if isinstance(given, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        odd = next((text for text in texts if not isinstance(text, str)), given)
        raise CalibrationError(
            "calibration must be a source's name or a list of strings, not empty; got "
            f"{odd!r:.60}"
        )
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    name = f"{len(given)} texts in memory ({digest.hexdigest()[:16]})"
    with register_object(name, list(given)):
        yield name


@contextlib.contextmanager
def register_object(name: str, thing: Any) -> Iterator[str]:
    """Register an object under a name within the context."""
    # A list, because two runs may register the same object at the same time.
    _objects.setdefault(name, []).append(thing)
    try:
        yield name
    finally:
        _objects[name].pop()


def find_packaged(distribution: str, ending: str) -> Path | None:
    """Return the file of an installed package whose name has this ending; None if there is none.

    The package is only read as data; importing it may need further packages.
    """
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    located = (Path(str(f.locate())) for f in files if f.name.endswith(ending))
    return next((path for path in located if path.is_file()), None)


ANSWERS = "answers:"
"""Prefix of a source of conversations: only the assistant's tokens count."""


@dataclass(frozen=True)
class Part:
    """One text of a mixture.

    Attributes:
        source: a source of text.
        name: the name in tables: a file's name without its folder, numbered if others have it; else
            the source.
        share: share of all tokens; the shares of all parts sum to 1.
    """

    source: str
    name: str
    share: float


def parts_of(source: str) -> tuple[Part, ...]:
    """Parse the parts of a mixture, in the order given; any other source is one part.

    An existing file or folder is never a mixture, whatever its name.

    Raises:
        CalibrationError: a part has no positive weight or no name, or occurs twice; the share of
            one rounds to zero; or shares do not sum to 1.
    """
    if "=" not in source or is_object_name(source) or _exists(source):
        return (Part(source, source, 1.0),)
    named = _parse_weights(source)
    sources = [name for name, _ in named]
    for name in sources:
        if sources.count(name) > 1:
            raise CalibrationError(f"the mixture {source!r} names {name!r} twice")
    files = [_without_folder(name) for name in sources]
    weights = [weight for _, weight in named]
    whole = sum(weights)
    if not min(weights) / whole:
        raise CalibrationError(
            f"the weights in {source!r} are too large or too unequal"
        )
    if any(weight % 1 for weight in weights) and not 0.98 < whole < 1.02:
        raise CalibrationError(
            f"the shares in {source!r} sum to {whole:g}; write shares that sum to 1, or whole "
            "numbers such as wiki=2,python=1"
        )
    # Files of one name are numbered, because their folders may be private.
    names = [
        file if files.count(file) == 1 else f"{file} ({files[: k + 1].count(file)})"
        for k, file in enumerate(files)
    ]
    return tuple(
        Part(source, name, weight / whole)
        for (source, weight), name in zip(named, names, strict=True)
    )


def place_of(source: str) -> str:
    """Return a source without the prefix ``answers:``."""
    return source if _exists(source) else source.removeprefix(ANSWERS)


def is_same_text(one: str, other: str) -> bool:
    """Whether two sources are one text, perhaps a file with its path typed in two ways."""
    first, second = (user_path(place_of(source)).resolve() for source in (one, other))
    return one == other or first == second


def shares_text(one: str, other: str) -> bool:
    """Whether a text, or a part of a mixture, is also in another."""
    return any(is_same_text(a, b) for a in places_in(one) for b in places_in(other))


def places_in(source: str) -> list[str]:
    """List the sources of a mixture, or the single source, without checking that they exist."""
    try:
        return [place_of(part.source) for part in parts_of(source)]
    except CalibrationError:
        return [source]


def describe_source(source: str) -> str:
    """Return a description of a text without folder names, which may be private."""
    try:
        parts = parts_of(source)
    except CalibrationError:
        parts = ()
    if len(parts) < 2:
        return _without_folder(source)
    return ", ".join(
        f"{part.share:.0%} {_without_folder(part.source)}" for part in parts
    )


# Folders of an absolute path in a sentence; their names may have spaces.
_FOLDERS = re.compile(r"(?<![\w.:/~])(~[^/\s]*)?/(?=\S)(?:[^/\n\"':;,()]*/)*")


def without_folders(value: Any) -> Any:
    """Return a JSON value without folder names in its texts and keys, for files that are shared.

    The names of texts are those of `describe_source`, as in the model card.
    """
    if isinstance(value, dict):
        sources = {
            k: describe_source(v)
            for k, v in value.items()
            if k in ("source", "text") and isinstance(v, str)
        }
        return {
            without_folders(k): without_folders(v) for k, v in (value | sources).items()
        }
    if isinstance(value, list):
        return [without_folders(v) for v in value]
    return _FOLDERS.sub("", _without_folder(value)) if isinstance(value, str) else value


def _parse_weights(source: str) -> list[tuple[str, float]]:
    weights = []
    for piece in source.split(","):
        name, _, number = (word.strip() for word in piece.rpartition("="))
        weight = 0.0
        with contextlib.suppress(ValueError):
            weight = float(number)
        if not name or not 0 < weight < math.inf:
            raise CalibrationError(
                f"the text {source!r} is not a file, and as a mixture its part {piece!r} is not "
                "SOURCE=WEIGHT with a positive number; write for example "
                "wiki=0.7,my-code.jsonl=0.3"
            )
        weights.append((name, weight))
    return weights


def _without_folder(source: str) -> str:
    place = place_of(source)
    # A path may no longer exist.
    path = (
        _exists(place) or has_format(Path(place)) or place.startswith((".", "/", "~"))
    )
    return source.removesuffix(place) + (Path(place).name if path else place)


def _exists(source: str) -> bool:
    return os.path.lexists(user_path(source))


@contextlib.contextmanager
def name_part(part: Part) -> Iterator[None]:
    """Add the name of a part of a mixture to errors within the context."""
    try:
        yield
    except IsingcutError as e:
        if part.share < 1:
            e.args = (f"part {part.name!r} of the mixture: {e}",)
        raise
