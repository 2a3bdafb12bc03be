"""Journals as kills and failing disks leave them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """The tables of a journal, to be changed."""
    with contextlib.closing(sqlite3.connect(path)) as found, found:
        yield found


def count_rows(path: Path) -> int:
    """How many rows a journal has."""
    with database(path) as found:
        return found.execute("SELECT count(*) FROM row").fetchone()[0]


def keep_rows(path: Path, rows: int, *, torn: int = 0) -> None:
    """Leave the first rows, and after them some that lack their end."""
    with database(path) as found:
        keys = [key for (key,) in found.execute("SELECT key FROM row ORDER BY rowid")]
        found.executemany("DELETE FROM row WHERE key = ?", [(k,) for k in keys[rows + torn :]])
        cut = "UPDATE row SET data = substr(data, 1, length(data) - 3) WHERE key = ?"
        found.executemany(cut, [(k,) for k in keys[rows : rows + torn]])
