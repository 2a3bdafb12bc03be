"""Finished parts of a measurement in an SQLite file: a killed run loses the row it was at."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.errors import InputError, StageFileError
from isingcut.files.inputs import SMALL, regular_file
from isingcut.files.writing import atomic_file, clear_os_errors

Row = npt.NDArray[np.float64]

_SCHEMA = (
    "CREATE TABLE measurement (fingerprint TEXT NOT NULL)",
    "CREATE TABLE row (key TEXT PRIMARY KEY, shape TEXT NOT NULL, crc INTEGER NOT NULL, "
    "data BLOB NOT NULL)",
)
_APPLICATION = 0x15136C07
"""What the header of the file says in the place for the application it belongs to."""
_SETTINGS = (
    # The file may come from others: it runs nothing of its own, and no damage goes unnoticed.
    "trusted_schema = OFF",
    "cell_size_check = ON",
    # A write-ahead log, synced at each row: nothing is lost but an unfinished one.
    "journal_mode = WAL",
    "synchronous = FULL",
)
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What reading a row of anything may raise."""
_BESIDE = ("-wal", "-shm")
"""SQLite's own files beside a journal, there while it is open and after a kill."""


class Journal:
    """Float64 arrays by key, each checksummed and synced to disk as it comes.

    A journal belongs to one measurement: opened with another ``fingerprint`` it starts afresh. A
    row that is damaged, not finite or none of this measurement's is left out: what it held is
    measured again.

    Args:
        path: the file; None keeps the rows in memory only.
        fingerprint: identifies model, tokens and states measured.
        fits: whether a row can be one of this measurement's, by its key and its shape.

    Raises:
        InputError: the disk is full, or the file may not be read or written.
        StageFileError: something else than a whole journal is at ``path``.
    """

    def __init__(
        self,
        path: Path | None,
        fingerprint: str,
        fits: Callable[[str, Row], bool] = lambda key, row: True,
    ) -> None:
        self.fingerprint = fingerprint
        self._path = path
        self._rows: dict[str, Row] = {}
        if path is None:
            return
        if os.path.lexists(path):
            _refuse_foreign(path)
        else:
            _create(path)
        with _clear_errors(path):
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            close = weakref.finalize(self, self._database.close)
            try:
                self._read(fits)
            except sqlite3.Error:
                close()
                raise

    def _read(self, fits: Callable[[str, Row], bool]) -> None:
        run = self._database.execute
        self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SMALL)
        for setting in _SETTINGS:
            run(f"PRAGMA {setting}")
        if [sql for (sql,) in run("SELECT sql FROM sqlite_master WHERE sql != ''")] != [*_SCHEMA]:
            raise sqlite3.DatabaseError("its tables are not a journal's")
        if run("SELECT fingerprint FROM measurement").fetchall() == [(self.fingerprint,)]:
            for key, shape, crc, data in run("SELECT * FROM row ORDER BY rowid"):
                with contextlib.suppress(*_UNFIT):
                    row = np.frombuffer(data, dtype=np.float64).reshape(json.loads(shape))
                    whole = isinstance(key, str) and _checksum(key, shape, data) == crc
                    if whole and np.isfinite(row).all() and fits(key, row):
                        self._rows[key] = row
            return
        run("BEGIN")
        run("DELETE FROM row")
        run("DELETE FROM measurement")
        run("INSERT INTO measurement VALUES (?)", (self.fingerprint,))
        run("COMMIT")

    def get(self, key: str) -> Row | None:
        """The row stored under ``key``, or None."""
        return self._rows.get(key)

    def keys(self) -> list[str]:
        """Of all rows, in the order in which they were put."""
        return list(self._rows)

    def put(self, key: str, row: Row) -> None:
        """Store ``row`` under ``key`` and sync it to disk."""
        row = np.ascontiguousarray(row, dtype=np.float64)
        self._rows[key] = row
        if self._path is None:
            return
        data, shape = row.tobytes(), json.dumps(row.shape)
        record = (key, shape, _checksum(key, shape, data), data)
        with _clear_errors(self._path):
            self._database.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?)", record)


def _checksum(key: str, shape: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{key}:{shape}".encode()))


def _create(path: Path) -> None:
    # What is left beside a journal that was deleted would be taken for the new one's.
    discard(path)
    with (
        atomic_file(path) as temporary,
        _clear_errors(path),
        contextlib.closing(sqlite3.connect(temporary)) as database,
    ):
        # What SQLite writes beside a database would stay after a kill: nothing, before the end.
        database.execute("PRAGMA journal_mode = MEMORY")
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        for table in _SCHEMA:
            database.execute(table)
        database.execute("PRAGMA journal_mode = WAL")


def _refuse_foreign(path: Path) -> None:
    """Refuse a file that isingcut did not write, before SQLite looks at it.

    Raises:
        StageFileError: it is none of ours, or of a version that kept its rows in another form.
    """
    regular_file(path, "the journal", StageFileError)
    with path.open("rb") as f:
        head = f.read(100)
    if head.startswith(b'{"format": "isingcut-journal"'):
        raise StageFileError(
            f"{path} is of an earlier version of isingcut; finish with that version, or delete "
            "it, and what it holds is measured again"
        )
    ours = head[:16] == b"SQLite format 3\0" and head[68:72] == _APPLICATION.to_bytes(4, "big")
    if not ours or path.is_symlink():
        raise StageFileError(f"{path} is not a journal of isingcut; move it away or delete it")
    rollback = path.with_name(f"{path.name}-journal")
    if os.path.lexists(rollback):
        # A journal of ours never has one, and one of others may name any file to be deleted.
        raise StageFileError(f"{rollback} is none of isingcut's; move it away or delete it")


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """What SQLite refuses, as one clear line."""
    with clear_os_errors(path):
        try:
            yield
        except sqlite3.OperationalError as e:
            if getattr(e, "sqlite_errorname", "") == "SQLITE_FULL":
                raise OSError(errno.ENOSPC, "") from e
            raise InputError(f"the journal {path} cannot be read or written: {e}") from e
        except sqlite3.Error as e:
            raise StageFileError(
                f"{path} is damaged ({e}); delete it, and what it held is measured again"
            ) from e


def discard(path: Path) -> None:
    """Delete a journal: its rows have become a results file."""
    for name in (path.name, *(path.name + end for end in _BESIDE)):
        path.with_name(name).unlink(missing_ok=True)
