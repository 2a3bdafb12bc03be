"""An append-only file of finished measurements: a killed run loses one micro-batch at most."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.errors import StageFileError
from isingcut.files import atomic_file, clear_os_errors
from isingcut.inputs import SMALL, parse_json, regular_file

_FORMAT = "isingcut-journal"


_LONGEST = SMALL
"""Bytes of a line: a row of a few million numbers."""

Row = npt.NDArray[np.float64]


class Journal:
    """Float64 arrays by key, one checksummed line each, appended and synced as they come.

    A journal belongs to one measurement: opened with another ``fingerprint`` it starts afresh.
    From the first line that is torn, damaged, not finite or none of this measurement's rows, as
    a kill or a failing disk leaves it, lines are dropped: what they held is measured again.

    Args:
        path: the file; None keeps the rows in memory only.
        fingerprint: identifies model, tokens and states measured.
        fits: whether a row can be one of this measurement's, by its key and its shape.

    Raises:
        StageFileError: something else than a journal is at ``path``.
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
        header = json.dumps({"format": _FORMAT, "fingerprint": fingerprint}).encode() + b"\n"
        valid = [header]
        if os.path.lexists(path):
            regular_file(path, "the journal", StageFileError)
            with path.open("rb") as f:
                if _refuse_foreign(path, f.readline(_LONGEST)) == header:
                    while self._accept(line := f.readline(_LONGEST), fits):
                        valid.append(line)
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(valid))

    def _accept(self, line: bytes, fits: Callable[[str, Row], bool]) -> bool:
        try:
            record = parse_json(line)
            key, shape = str(record["key"]), record["shape"]
            data = base64.b64decode(record["data"], validate=True)
            row = np.frombuffer(data, dtype=np.float64).reshape(shape)
            whole = line.endswith(b"\n") and _checksum(key, shape, data) == record["crc"]
            if not whole or not np.isfinite(row).all() or not fits(key, row):
                return False
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            return False
        self._rows[key] = row.copy()
        return True

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
        data, shape = row.tobytes(), list(row.shape)
        record = {
            "key": key,
            "shape": shape,
            "crc": _checksum(key, shape, data),
            "data": base64.b64encode(data).decode(),
        }
        with clear_os_errors(self._path), self._path.open("ab") as f:
            f.write(json.dumps(record).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def _refuse_foreign(path: Path, first: bytes) -> bytes:
    """The first line of a journal, or of what a kill left before it was written.

    Raises:
        StageFileError: it is a line of something else.
    """
    with contextlib.suppress(ValueError):
        found = parse_json(first) if first else {"format": _FORMAT}
        if isinstance(found, dict) and found.get("format") == _FORMAT:
            return first
    raise StageFileError(f"{path} is not a journal of isingcut; move it away or delete it")


def _checksum(key: str, shape: list[int], data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{key}:{shape}".encode()))
