"""An append-only file of finished measurements: a killed run loses one micro-batch at most."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.files import atomic_file, clear_os_errors


class Journal:
    """Float64 arrays by key, one checksummed line each, appended and synced as they come.

    A journal belongs to one measurement: opened with another ``fingerprint`` it starts afresh.
    A torn last line, as a kill leaves it, is dropped.

    Args:
        path: the file; None keeps the rows in memory only.
        fingerprint: identifies model, tokens and states measured.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._path = path
        self._rows: dict[str, npt.NDArray[np.float64]] = {}
        self._listener: Callable[[str, npt.NDArray[np.float64]], None] | None = None
        if path is None:
            return
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        header = json.dumps({"format": "isingcut-journal", "fingerprint": fingerprint}).encode()
        valid = [header]
        if lines and lines[0] == header:
            for line in lines[1:]:
                if not self._accept(line):
                    break
                valid.append(line)
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in valid))

    def _accept(self, line: bytes) -> bool:
        try:
            record = json.loads(line)
            data = base64.b64decode(record["data"], validate=True)
            if _checksum(record["key"], record["shape"], data) != record["crc"]:
                return False
            row = np.frombuffer(data, dtype=np.float64).reshape(record["shape"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        self._rows[record["key"]] = row.copy()
        return True

    def get(self, key: str) -> npt.NDArray[np.float64] | None:
        """The row stored under ``key``, or None."""
        return self._rows.get(key)

    def keys(self) -> list[str]:
        """Of all rows, in the order in which they were put."""
        return list(self._rows)

    def put(self, key: str, row: npt.NDArray[np.float64]) -> None:
        """Store ``row`` under ``key`` and sync it to disk."""
        row = np.ascontiguousarray(row, dtype=np.float64)
        self._rows[key] = row
        if self._listener is not None:
            self._listener(key, row)
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

    @contextlib.contextmanager
    def told(self, listener: Callable[[str, npt.NDArray[np.float64]], None]) -> Iterator[None]:
        """Meanwhile, tell ``listener`` of each row that is put."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def remove(self) -> None:
        """Delete the file: its rows have become a results file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _checksum(key: str, shape: list[int], data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{key}:{shape}".encode()))
