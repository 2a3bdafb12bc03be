"""Bytes of files and pipes within bounds: how much comes, and how long nothing may come."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import select
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from isingcut.errors import CalibrationError, first_line

STREAM = 1 << 30
"""Bytes that are read out of a pipe, and that a .gz may unpack to, at most."""
PATIENCE = 120.0
"""Seconds that a pipe may stay silent."""

_HEAD = 1 << 16


def opened(path: Path, name: str) -> tuple[BinaryIO, bool]:
    """The bytes of what is at ``path`` (``-`` is standard input); whether it is a plain file.

    Opening does not wait for anybody to write; reading does, for `PATIENCE` at a time.
    """
    if str(path) == "-":
        descriptor = os.dup(0)
    else:
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, os.O_RDONLY | flags)
    plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
    return io.BufferedReader(_Descriptor(descriptor, name, waits=not plain)), plain


def unpacked(stream: BinaryIO) -> BinaryIO:
    """What a stream of gzip holds."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))


def limited(stream: BinaryIO, name: str) -> BinaryIO:
    """A stream that gives `STREAM` bytes at most."""
    return io.BufferedReader(_Limited(stream, name, STREAM))


def looked_at(stream: BinaryIO, name: str) -> tuple[bytes, BinaryIO]:
    """The beginning of a stream, and a stream that still has it."""
    head = b""
    while len(head) < 4 or (len(head) < _HEAD and not head.removeprefix(codecs.BOM_UTF8).strip()):
        if not (more := stream.read(1)):
            break
        head += more
    return head, io.BufferedReader(_Limited(stream, name, None, head))


class _Limited(io.RawIOBase):
    """A stream that may give ``limit`` bytes at most, after ``head``."""

    def __init__(self, stream: BinaryIO, name: str, limit: int | None, head: bytes = b"") -> None:
        super().__init__()
        self._stream, self._name, self._limit, self._head = stream, name, limit, head
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._head[: len(buffer)]
        self._head = self._head[len(found) :]
        found = found or self._stream.read1(len(buffer))  # type: ignore[attr-defined]
        self._given += len(found)
        if self._limit is not None and self._given > self._limit:
            raise CalibrationError(
                f"{self._name} gives more than {self._limit} bytes, the most that is read of a "
                "pipe or a .gz; take a part of it (head -c), or write it into a plain file"
            )
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Descriptor(io.RawIOBase):
    """A file descriptor; one that ``waits`` for a writer does so for `PATIENCE` at most."""

    def __init__(self, descriptor: int, name: str, *, waits: bool) -> None:
        super().__init__()
        self._descriptor, self._name, self._waits = descriptor, name, waits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._waits:
                self._wait()
            with contextlib.suppress(BlockingIOError):
                found = os.read(self._descriptor, len(buffer))
                buffer[: len(found)] = found
                return len(found)

    def _wait(self) -> None:
        if sys.platform == "win32":
            return
        ready = select.poll()
        ready.register(self._descriptor, select.POLLIN)
        if not ready.poll(PATIENCE * 1000):
            raise CalibrationError(
                f"nothing came through {self._name} for {PATIENCE:g} seconds; does anything write "
                "into that pipe?"
            )

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Say in one line what cannot be read, and why."""
    try:
        yield
    except UnicodeDecodeError as e:
        raise CalibrationError(
            f"{name} is not UTF-8 (byte {e.object[e.start]:#04x} does not fit); save it as UTF-8"
        ) from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise CalibrationError(
            f"{name} is no whole gzip file ({first_line(e)}); pack it anew"
        ) from e
    except OSError as e:
        raise CalibrationError(f"{name} cannot be read: {e.strerror or first_line(e)}") from e
