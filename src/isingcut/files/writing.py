"""Write files and folders atomically, under a lock.

Each is written to a temporary sibling, which is renamed when it is complete. One process at a time
writes to a place, under a lock of the operating system. A killed process leaves only the lock file
and temporary siblings, which the next process deletes. Readers take no lock.
"""

import contextlib
import errno
import functools
import glob
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from isingcut.console.printing import say
from isingcut.errors import BusyError, InputError
from isingcut.files.inputs import read_text
from isingcut.files.ownership import check_output, mark

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.isingcut-\w+\.(?P<kind>part|old)")
LOCK = "isingcut.lock"
"""The lock file in a work folder."""


@contextlib.contextmanager
def clear_os_errors(target: Path) -> Iterator[None]:
    """Convert errors of the operating system, while ``target`` is written, to one-line errors.

    Raises:
        InputError: the disk is full or failing, or the place is not writable or does not exist.
    """
    try:
        yield
    except Exception as e:
        # torch's writer reports the position where it stopped, but not the reason: a full disk.
        stopped = re.search("PytorchStreamWriter failed|unexpected pos", str(e))
        if (code := _code_of(e)) in (errno.ENOSPC, errno.EDQUOT) or stopped:
            raise InputError(
                f"no space left on the disk, {target} was not written; free some space or choose "
                "another --out, then run the same command again"
            ) from e
        # Not converted: a missing file may be an input, and others have their own messages.
        if code not in (0, errno.ENOENT, errno.ENOMEM, errno.EPIPE, errno.EMFILE):
            raise InputError(
                f"cannot write {target}: {os.strerror(code)}; choose a writable place"
            ) from e
        raise


def os_error_words(error: OSError) -> str:
    """Describe an error of the operating system in one line: the places and the reason."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        # `copytree` lists all files that it could not copy; show the first.
        source, target, words = error.args[0][0]
        why = os.strerror(code) if (code := _code_of(error)) else words
        return f"cannot copy {source} to {target}: {why}"
    places = [
        os.fsdecode(p)
        for p in (error.filename, error.filename2)
        if isinstance(p, str | bytes)
    ]
    why = (error.strerror or str(error) or type(error).__name__).strip()
    return f"{' and '.join(places)}: {why}" if places else why


def _code_of(error: Exception) -> int:
    """Return the errno of an error.

    For errors of Rust libraries and of `copytree`, it is in the message.
    """
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.errno or 0
    if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
        return 0
    code = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
    return int(code[1]) if code else 0


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write to; it is renamed to ``path`` on success."""
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".part", temporary_prefix(path), path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as f:
                os.fsync(f.fileno())
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Yield a temporary sibling folder; it is marked and renamed to ``path`` on success.

    Args:
        overwrite: allow replacing an output of isingcut at ``path``.
        sources: the files that the content is made from, as in `check_output`.

    Raises:
        InputError: ``path`` is, contains or lies in a source.
        OutputExistsError: ``path`` exists, and ``overwrite`` is false or it has user files.
    """
    check_output(path, overwrite=overwrite, sources=sources)
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(".part", temporary_prefix(path), path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):
                # Libraries such as safetensors leave temporary files like this.
                if stat.S_IMODE(file.lstat().st_mode) == 0o600:
                    file.chmod(0o666 & ~_umask())
            mark(temporary)
            # It may have been created after the first check.
            check_output(path, overwrite=overwrite, sources=sources)
            with _moved_aside(path):
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file or folder; after a kill it is unchanged, or no longer at ``path``."""
    if path.is_dir():
        with _moved_aside(path):
            pass
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _moved_aside(path: Path) -> Iterator[None]:
    """Move a file or folder aside, if there is one, and delete it after the context.

    A kill leaves one whole folder under a recognisable name, not a mixture.
    """
    if not os.path.lexists(path):
        yield
        return
    aside = Path(tempfile.mkdtemp(".old", temporary_prefix(path), path.parent))
    os.replace(path, aside / path.name)
    yield
    shutil.rmtree(aside)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is deleted by the process that made it, and not by a fork of it."""
    made_by = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix="isingcut-"))
    try:
        yield folder
    finally:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_prefix(path: Path) -> str:
    """Return the prefix of the names of temporary siblings, which those of one share with it."""
    own = _TEMPORARY.fullmatch(path.name)
    return f".{own['name'] if own else path.name}.isingcut-"


def lock_beside(path: Path) -> Path:
    """Return the path of an output's lock file."""
    return path.with_name(f".{path.name}.isingcut.lock")


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary file or folder of isingcut, or a lock file."""
    return path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders of killed processes; the caller must have the lock.

    An old folder that was moved aside is restored if the new one did not replace it.

    Args:
        name: name of the file or folder whose siblings are deleted; by default, those of all but
            outputs with their own lock file.
    """
    for path in sorted(folder.glob(f".{glob.escape(name) or '*'}.isingcut-*")):
        left = _TEMPORARY.fullmatch(path.name)
        if left is None or (not name and lock_beside(folder / left["name"]).exists()):
            continue
        own = folder / left["name"]
        if left["kind"] == "old" and not own.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(path / own.name, own)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# Locks -----------------------------------------------------------------------------------

# The errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
_HOLDER = re.compile(r"(pid \d+, host .+) since (\S+ \S+)\n")
_held: set[tuple[int, int, Path]] = set()


@contextlib.contextmanager
def lock_place(
    place: Path, *, inside: bool = False, wait: bool = False
) -> Iterator[bool]:
    """Lock ``place``, which need not exist, so that no other process writes to it.

    Half-written files of killed processes are deleted first.

    Args:
        inside: whether ``place`` is a work folder with the lock file in it. Otherwise ``place`` is
            an output, and the lock file is a hidden sibling.
        wait: whether to wait for another process instead of raising an error.

    Yields:
        False if this thread has the lock already.

    Raises:
        BusyError: another process, or another thread, writes to the place.
        InputError: the place is not writable.
    """
    folder = place if inside else place.parent
    holder = _holder(place, inside=inside)
    file = holder[2]
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
        # A fork of this process does not own the lock.
        if os.getpid() == holder[0]:
            if holder in _held:
                _held.discard(holder)
                # Delete it under the lock: a process that has it open notices and creates another.
                with contextlib.suppress(OSError):
                    file.unlink()
            lock.release()
            for made in missing:
                with contextlib.suppress(OSError):
                    made.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether this thread has the lock of a work folder."""
    return _holder(folder, inside=True) in _held


def _holder(place: Path, *, inside: bool) -> tuple[int, int, Path]:
    """Return this process and thread, and the lock file of a place."""
    with clear_os_errors(place):
        real = Path(os.path.realpath(place if inside else place.parent))
        real = real if inside else real / place.name
    file = real / LOCK if inside else lock_beside(real)
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
        # If the lock file cannot be written, the output cannot either.
        return
    with contextlib.suppress(OSError):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"pid {os.getpid()}, host {platform.node()} since {now}\n")


def _who(file: Path, place: Path) -> str:
    """Return the message of a `BusyError`, with the process that has the lock."""
    who = since = ""
    with contextlib.suppress(InputError):
        if holder := _HOLDER.fullmatch(read_text(file, "the lock", limit=1000)):
            who = f" ({holder[1]})"
            since = f" since {holder[2]}"
    return (
        f"another isingcut{who} is writing to {place}{since}; wait for it, or stop it"
    )


@functools.cache
def _say_no_locks(folder: Path) -> None:
    say(
        f"isingcut: warning: the file system of {folder} does not support locks; "
        "do not start a second isingcut there"
    )
