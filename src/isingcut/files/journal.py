"""Journals: finished rows of a measurement, one per line, which stay when a run is killed."""

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isingcut.errors import StageFileError
from isingcut.files.inputs import regular_file
from isingcut.files.writing import atomic_file, clear_os_errors

Values = npt.NDArray[np.float64]

_BEGIN = b'{"format": "isingcut-journal", "version": 2, "of": "'


class Journal:
    """Float64 arrays by key, each with a checksum and synced to disk when they are stored.

    A journal belongs to one measurement: with another ``fingerprint`` it starts empty. A row that
    is damaged, not finite or of another measurement is ignored, and measured again.

    Args:
        path: the file; None keeps the rows in memory only.
        fingerprint: fingerprint of the measured model, tokens and states.

    Raises:
        InputError: the disk is full, or the file cannot be read or written.
        StageFileError: ``path`` is not a journal of this version.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._path = path
        self._rows = dict[str, Values]()
        if path is None:
            return
        header = _BEGIN + f'{fingerprint}"}}'.encode()
        with clear_os_errors(path):
            lines = _read_lines(path) if os.path.lexists(path) else []
            if lines[:1] != [header]:
                lines = []
                with atomic_file(path) as temporary:
                    temporary.write_bytes(header)
        for line in lines[1:]:
            checksum, _, text = line.partition(b" ")
            # Parsing an arbitrary row may raise anything.
            with contextlib.suppress(Exception):
                key, shape, data = json.loads(text)
                row = np.frombuffer(base64.b64decode(data), dtype=np.float64).reshape(
                    shape
                )
                whole = isinstance(key, str) and checksum == _checksum(text)
                if whole and np.isfinite(row).all():
                    self._rows[key] = row

    def get(self, key: str) -> Values | None:
        """Return the row stored under ``key``, or None."""
        return self._rows.get(key)

    def put(self, rows: Mapping[str, Values]) -> None:
        """Store rows under their keys and sync them to disk."""
        new = {
            k: np.ascontiguousarray(row, dtype=np.float64) for k, row in rows.items()
        }
        self._rows |= new
        if self._path is None:
            return
        with clear_os_errors(self._path), self._path.open("ab") as file:
            for key, row in new.items():
                data = base64.b64encode(row.tobytes()).decode()
                text = json.dumps([key, row.shape, data]).encode()
                # Begin with a line end, because a kill may have left the last line without one.
                file.write(b"\n" + _checksum(text) + b" " + text)
            file.flush()
            os.fsync(file.fileno())


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _read_lines(path: Path) -> list[bytes]:
    """Read the lines of a journal of any measurement.

    Raises:
        StageFileError: not a journal of isingcut, or of a version with another format.
    """
    regular_file(path, "the journal", StageFileError)
    content = path.read_bytes()
    if path.is_symlink() or not content.startswith(_BEGIN):
        raise StageFileError(
            f"{path} is not a journal of this version of isingcut; finish with the version that "
            "wrote it, or move the file away to measure its rows again"
        )
    return content.split(b"\n")
