"""One writer at a time: a lock of the operating system on a run folder or an output.

A process that is killed leaves no lock, only the file that the lock was on, which the next writer
takes over. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from isingcut.console.printing import say
from isingcut.errors import BusyError, InputError
from isingcut.files.inputs import read_text
from isingcut.files.writing import LOCK, clear_leftovers, clear_os_errors, lock_beside

# Of a file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
_HOLDER = re.compile(r"(pid \d+, host .+) since (\S+ \S+)\n")

_held: set[tuple[int, int, Path]] = set()


@contextlib.contextmanager
def locked(place: Path, *, inside: bool = False, wait: bool = False) -> Iterator[bool]:
    """Be the only process that writes to ``place``, there or not yet.

    What killed processes left half-written there is deleted first.

    Args:
        inside: ``place`` is a folder to work in, and holds its lock; that of an output, which takes
            its name at the end, is a hidden file beside it.
        wait: until another process is done, instead of an error.

    Yields:
        False where this thread has the lock already.

    Raises:
        BusyError: another process, or another thread, writes there.
        InputError: nothing can be written there.
    """
    folder = place if inside else place.parent
    file = _lock_of(place, inside=inside)
    holder = _this(file)
    if holder in _held:
        yield False
        return
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    lock = FileLock(file, fallback_to_soft=False, thread_local=False)
    try:
        with clear_os_errors(place):
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, file, place, wait=wait)
        _held.add(holder)
        if lock.is_locked:
            for where in (folder, *(folder.glob("remove-*/") if inside else ())):
                clear_leftovers(where, "" if inside else place.name)
        yield True
    finally:
        # A fork of this process has no part in it.
        if os.getpid() == holder[0]:
            if holder in _held:
                _held.discard(holder)
                # While it is locked: whoever has opened it by now finds it gone, and makes another.
                with contextlib.suppress(OSError):
                    file.unlink()
            lock.release()
            for made in missing:
                with contextlib.suppress(OSError):
                    made.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether this thread has the lock of a folder that it works in."""
    return _this(_lock_of(folder, inside=True)) in _held


def _lock_of(place: Path, *, inside: bool) -> Path:
    with clear_os_errors(place):
        real = place.resolve() if inside else place.parent.resolve() / place.name
    return real / LOCK if inside else lock_beside(real)


def _this(file: Path) -> tuple[int, int, Path]:
    return os.getpid(), threading.get_ident(), file


def _acquire(lock: FileLock, file: Path, place: Path, *, wait: bool) -> None:
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise BusyError(_who(file, place)) from None
    except OSError as e:
        if e.errno in _NO_LOCKS:
            _say_no_locks(file.parent)
        elif e.errno not in _NO_WRITING or file.exists():
            raise
        # Where no lock can be written, nothing can.
        return
    with contextlib.suppress(OSError):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"pid {os.getpid()}, host {platform.node()} since {now}\n")


def _who(file: Path, place: Path) -> str:
    """Who works in a place, as far as the lock's file says it."""
    found = None
    with contextlib.suppress(InputError):
        found = _HOLDER.fullmatch(read_text(file, "the lock", limit=1000))
    who, since = (f" ({found[1]})", f" since {found[2]}") if found else ("", "")
    return f"another isingcut{who} works in {place}{since}; wait until it is done, or end it"


@functools.cache
def _say_no_locks(folder: Path) -> None:
    say(
        f"isingcut: warning: the file system of {folder} has no locks; "
        "let no second isingcut write there meanwhile"
    )
