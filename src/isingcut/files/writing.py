"""What is written: whole or not at all, by one writer, and never over what is not ours.

Results files go to a temporary sibling that is renamed; their format is checked on reading. With
`--overwrite` only what isingcut wrote is replaced, and never a source: a folder that isingcut
writes holds a marker file with the name and fingerprint of every file in it, and a hash over these;
a text file ends with a seal, the hash of what stands before it. What has neither, or was changed
since, is the user's and stays. One process writes to a place, under a lock of the operating system;
one that is killed leaves only the file that the lock was on. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from isingcut.console.printing import say
from isingcut.errors import BusyError, InputError, IsingcutError, OutputExistsError, StageFileError
from isingcut.files.inputs import load_json, parse_json, read_text, regular_file

if TYPE_CHECKING:
    import numpy.typing as npt

    from isingcut.files.documents import Document, StageRecord

D = TypeVar("D", bound="Document")

_VERSION = 1
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.isingcut-\w+\.(?P<kind>part|old)")
LOCK = "isingcut.lock"
"""The file in a folder to work in that `locked` locks."""


def disk_is_full(error: Exception) -> bool:
    """Whether an error is a full disk's: the system's own, or of a library that hides it."""
    # torch's writer says where it stopped and not why.
    said = ("PytorchStreamWriter failed", "unexpected pos")
    full = _code_of(error) in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in said)


@contextlib.contextmanager
def clear_os_errors(target: Path) -> Iterator[None]:
    """Turn what the operating system refuses while ``target`` is written into one clear line.

    Raises:
        InputError: the disk is full or failing, the place may not be written to, or is no place.
    """
    try:
        yield
    except Exception as e:
        if disk_is_full(e):
            raise InputError(
                f"no space left on the disk, so that {target} was not written; free some space or "
                "choose another --out, then run the same command again"
            ) from e
        if (code := _code_of(e)) in _REFUSED:
            raise InputError(
                f"cannot write {target}: {os.strerror(code)}; choose a place that you may write to"
            ) from e
        raise


_REFUSED = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EROFS", "EPERM", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "EIO"),
        *("EFBIG", "EINVAL", "EEXIST", "ENXIO", "ESTALE", "ETXTBSY", "EBUSY", "EMLINK"),
    )
    if hasattr(errno, name)
}


def os_error_words(error: OSError) -> str:
    """What the operating system refused, where, and why, in one line."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        # Of the files of a folder that could not be copied, the first.
        source, target, words = error.args[0][0]
        why = os.strerror(code) if (code := _code_of(error)) else words
        return f"{source} cannot be copied to {target}: {why}"
    places = [
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
    ]
    why = (error.strerror or str(error) or type(error).__name__).strip()
    return f"{' and '.join(places)}: {why}" if places else why


def _code_of(error: Exception) -> int:
    """The operating system's number for an error.

    That of a Rust library, or of a folder that could not be copied, is in its words.
    """
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.errno or 0
    worded = isinstance(error, shutil.Error) or type(error).__name__ == "SafetensorError"
    found = _CODE.search(str(error)) if worded else None
    return int(found[1]) if found else 0


_CODE = re.compile(r"(?:os error |\[Errno )(\d+)")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it takes the name ``path`` only on success."""
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
    path: Path, *, overwrite: bool = False, sources: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """A temporary sibling folder to fill; it takes the name ``path`` only on success, marked.

    Args:
        overwrite: what isingcut wrote at ``path`` may be replaced.
        sources: what the content is made from, as in `check_output`.

    Raises:
        InputError: ``path`` is, contains or lies in a source.
        OutputExistsError: ``path`` exists, and ``overwrite`` is false or it is not all ours.
    """
    check_output(path, overwrite=overwrite, sources=sources)
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(".part", temporary_prefix(path), path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):
                # So libraries leave what they write aside first (safetensors its weights).
                if stat.S_IMODE(file.lstat().st_mode) == 0o600:
                    file.chmod(0o666 & ~_umask())
            mark(temporary)
            if os.path.lexists(path):
                # It may have come into being since.
                check_output(path, overwrite=overwrite, sources=sources)
                # The old folder is moved aside first, so that a kill between the two renames
                # leaves one whole folder under a recognisable name instead of a mixture.
                aside = Path(tempfile.mkdtemp(".old", temporary_prefix(path), path.parent))
                os.replace(path, aside / path.name)
                os.replace(temporary, path)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file or folder; a kill leaves it whole, or gone from its place."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = Path(tempfile.mkdtemp(".old", temporary_prefix(path), path.parent))
    os.replace(path, aside / path.name)
    shutil.rmtree(aside)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes with the process that made it; a fork of that process leaves it alone."""
    made_by, folder = os.getpid(), Path(tempfile.mkdtemp(prefix="isingcut-"))
    try:
        yield folder
    finally:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_prefix(path: Path) -> str:
    """How the name of a temporary sibling starts."""
    return f".{path.name}.isingcut-"


def lock_beside(path: Path) -> Path:
    """The file that `locked` locks for an output."""
    return path.with_name(f".{path.name}.isingcut.lock")


def is_leftover(path: Path) -> bool:
    """Whether it is a temporary file or folder of ours, or a lock."""
    return path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders that killed processes left; the caller has the lock.

    An old folder that was moved aside comes back where the new one did not take its place.

    Args:
        name: only those beside the file or folder of that name; else all but those of an output
            with a lock of its own.
    """
    for path in sorted(folder.glob(f".{glob.escape(name) or '*'}.isingcut-*")):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or (not name and lock_beside(folder / found["name"]).exists()):
            continue
        if found["kind"] == "old" and not (folder / found["name"]).exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(path / found["name"], folder / found["name"])
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, kind: str, content: dict[str, Any], *, seal: bool = False) -> None:
    """Write ``content`` as an isingcut results file of the given kind.

    Args:
        seal: say in the file itself that isingcut wrote it, where no `run.json` does.
    """
    document = {"format": f"isingcut-{kind}", "version": _VERSION, **content}
    if seal:
        document["seal"] = _hash(document)
    with atomic_file(path) as temporary:
        text = json.dumps(document, indent=1, allow_nan=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_sealed(path: Path, content: str) -> None:
    """Write Markdown or HTML that says in a comment at its end that isingcut wrote it."""
    with atomic_file(path) as temporary:
        temporary.write_text(sealed(content), encoding="utf-8")


def write_document(path: Path, document: Document, *, seal: bool = False) -> None:
    """Write a document as the results file that `read_document` reads."""
    write_json(path, document.kind, document.content(), seal=seal)


def read_document(path: Path, model: type[D]) -> D:
    """The document in a results file, see `documents`.

    Raises:
        StageFileError: missing, not JSON, of another kind, of a newer version, or damaged.
    """
    found = check_document(path, _load(path), model.kind)
    assert isinstance(found, model)
    return found


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The same as plain JSON, checked, with its header."""
    document = _load(path)
    check_document(path, document, kind)
    assert isinstance(document, dict)
    return document


def _load(path: Path) -> Any:
    if not os.path.lexists(path):
        raise StageFileError(
            f"expected the file {path}, which is not there; run the stage before it"
        )
    return load_json(path, "the results file", StageFileError)


def check_document(path: Path, document: Any, kind: str) -> Document:
    """The content of an isingcut document of this kind.

    Raises:
        StageFileError: another format, a newer version, or a damaged content.
    """
    # Making its models takes 50 ms, which only who reads a file pays.
    from isingcut.files import documents

    found = document.get("format") if isinstance(document, dict) else None
    if found != f"isingcut-{kind}":
        raise StageFileError(
            f"{path} is not an isingcut {kind} file (expected format 'isingcut-{kind}', "
            f"found {repr(found)[:60]}); give the right file, or delete it and run its stage again"
        )
    written = document.get("version")
    if type(written) is not int or written < 1:
        raise documents.damaged(path, f"version: expected a number from 1, got {written!r:.60}")
    if written > _VERSION:
        raise StageFileError(
            f"{path} was written by a newer isingcut (file version {written}, "
            f"this one reads up to {_VERSION}); upgrade isingcut"
        )
    return documents.parse_content(path, kind, without_header(document))


def without_header(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file says beside its format and version."""
    return {k: v for k, v in document.items() if k not in ("format", "version")}


def without_infinities(value: Any) -> Any:
    """``value`` with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: without_infinities(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(v) for v in value]
    return value


def fingerprint(content: Any) -> str:
    """Short SHA-256 of a JSON-able value, independent of key order."""
    encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


# What may be replaced ---------------------------------------------------------------------

MARKER = ".isingcut-output.json"

_EDGE = 1 << 20
_SEAL = re.compile(r"\bisingcut-seal:([0-9a-f]{64})\b")


def check_output(
    path: Path, *, overwrite: bool, sources: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse an output that must not be written at ``path``.

    Args:
        path: a file or folder, there or not.
        overwrite: what isingcut wrote there may be replaced.
        sources: what this command and its run read: model, teacher, GGUF, text, config.

    Raises:
        InputError: ``path`` is, contains or lies in a source, whatever ``overwrite`` says.
        OutputExistsError: it is there, and ``overwrite`` is false or something in it is not ours.
    """
    refuse_source(path, sources)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(
            f"the output {path} already exists and nothing was written; "
            "choose another place, or overwrite it (--overwrite, overwrite=True)"
        )
    foreign = foreign_in(path) if path.is_dir() else _foreign_file(path)
    if foreign is not None:
        raise OutputExistsError(
            f"the output {path} stays as it is: {foreign}, and --overwrite replaces only what "
            "isingcut wrote; move it away or choose another --out"
        )


def refuse_source(path: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is, contains or lies in something that is read.

    Links are resolved; a hard link to a source file is that file.

    Raises:
        InputError: it does; the message names both.
    """
    real = _real(path)
    for source in map(Path, sources):
        if not os.path.lexists(source):
            continue
        read = _real(source)
        if real == read or _same_file(path, source):
            how = "is"
        elif read.is_relative_to(real):
            how = "contains"
        elif real.is_relative_to(read):
            how = "lies in"
        else:
            continue
        raise InputError(
            f"the output {path} {how} {source}, which this command reads; nothing was written: "
            "choose another place for the output"
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as e:
        raise InputError(f"{path} cannot be resolved: {e}; give a plain path") from e


def _same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


# Folders --------------------------------------------------------------------------------


def mark(folder: Path) -> None:
    """Write the marker of a folder that is complete."""
    files = {name: edges_sha256(folder / name) for name in sorted(_files_in(folder))}
    files.pop(MARKER, None)
    content = {"format": "isingcut-output", "version": 1, "files": files, "sha256": _hash(files)}
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _marked(folder: Path) -> dict[str, str] | None:
    """The files that a folder's marker names, with their fingerprints; None without a whole one."""
    try:
        document = load_json(folder / MARKER, "the marker")
        files = document["files"]
        whole = document["format"] == "isingcut-output" and document["sha256"] == _hash(files)
    except (IsingcutError, KeyError, TypeError):
        return None
    return files if whole and isinstance(files, dict) else None


def foreign_in(folder: Path) -> str | None:
    """What in a folder isingcut did not write, in words; None where all of it is ours.

    An empty folder holds nothing of the user's.
    """
    present = _files_in(folder)
    if not present:
        return None
    files = _marked(folder)
    if files is None:
        if MARKER in present:
            return f"its {MARKER} was changed"
        return f"it holds {_some(present)}, and nothing in it says that isingcut wrote it"
    if more := present - files.keys() - {MARKER}:
        return f"isingcut did not write {_some(more)} in it"
    changed = {name for name in present - {MARKER} if files[name] != edges_sha256(folder / name)}
    return f"{_some(changed)} in it was changed since" if changed else None


def folder_hash(folder: Path) -> str | None:
    """The hash in a folder's marker; None where it has no whole marker."""
    files = _marked(folder)
    return None if files is None else _hash(files)


def changed_in(folder: Path, recorded: str, *, gone: bool = True) -> str | None:
    """What was changed in a folder since its hash was recorded, in words; None for nothing.

    Files that were added are not looked at, nor is Markdown: a model card is for editing.

    Args:
        gone: files that were deleted count.
    """
    files = _marked(folder)
    if files is None or _hash(files) != recorded:
        return f"its {MARKER} was changed"
    changed = {
        name
        for name, found in files.items()
        if not name.endswith(".md")
        and (gone or (folder / name).exists())
        and edges_sha256(folder / name) != found
    }
    return f"{_some(changed)} in it was changed" if changed else None


def refuse_changed(folder: Path) -> None:
    """Refuse a folder that isingcut wrote and in which a file was edited since, but for Markdown.

    Raises:
        InputError: with what was edited.
    """
    if not (folder / MARKER).is_file():
        return
    changed = changed_in(folder, folder_hash(folder) or "", gone=False)
    if changed is not None:
        raise InputError(
            f"{folder} is not as isingcut wrote it: {changed}; write it again, or delete its "
            f"{MARKER} to take it as it is"
        )


def _some(names: set[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _files_in(folder: Path) -> set[str]:
    """Everything below a folder that is no folder, and every empty folder, by relative name."""
    found = set()
    for place, folders, names in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*names, *links]:
            found.add((here / name).relative_to(folder).as_posix())
        if not folders and not names and here != folder:
            found.add(here.relative_to(folder).as_posix())
    return found


def edges_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of its first and last MiB: a large one is not read whole."""
    if path.is_symlink() or not path.is_file():
        return "no plain file"
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(_EDGE))
        f.seek(max(0, size - _EDGE))
        digest.update(f.read(_EDGE))
    return digest.hexdigest()


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Stages of a run folder ------------------------------------------------------------------


def check_recorded(stages: Mapping[str, StageRecord], folder: Path, file: Path) -> None:
    """Refuse a file of a run folder that is not as the run wrote it.

    Args:
        stages: the records in its `run.json`.

    Raises:
        StageFileError: there is no record of it, its stage is not finished, or it was changed.
    """
    record = stages.get(str(file.relative_to(folder)))
    if record is None:
        raise StageFileError(f"{file} was not written by this run; move it away")
    if not record.done:
        raise StageFileError(f"{file} is not finished; run its stage again: {record.stage}")
    changed = changed_since(file, record)
    if changed is not None:
        raise StageFileError(
            f"{file} was changed or damaged since the run wrote it ({changed}); "
            "delete it and run its stage again (other blocks are cut with --blocks)"
        )


def changed_since(file: Path, record: StageRecord) -> str | None:
    """How a file or folder differs from what was recorded, in words; None where it does not.

    A stage that was interrupted recorded no hash, nor did earlier versions for folders.
    """
    if record.sha256 is None:
        return None
    if file.is_dir():
        return changed_in(file, record.sha256)
    if not file.is_file():
        return "it is no plain file"
    return None if file_sha256(file) == record.sha256 else "its hash is another"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Text files -----------------------------------------------------------------------------


def sealed(content: str) -> str:
    """Markdown or HTML with a last line, a comment, that seals it."""
    body = content if content.endswith("\n") else content + "\n"
    words = f"isingcut-seal:{hashlib.sha256(body.encode()).hexdigest()}"
    return f"{body}<!-- {words} -->\n"


def _foreign_file(path: Path) -> str | None:
    """Why a file is not one that isingcut wrote and nobody changed; None where it is.

    The seal of a JSON document is the hash of all its other keys.
    """
    try:
        text = read_text(path, "the output")
        if path.suffix == ".json":
            document = parse_json(text)
            seal, found = document.pop("seal"), _hash(document)
        else:
            body, _, last = text.removesuffix("\n").rpartition("\n")
            found = hashlib.sha256(f"{body}\n".encode()).hexdigest()
            seal = _SEAL.findall(last)[0]
    except (IsingcutError, ValueError, LookupError, AttributeError, TypeError):
        return "nothing in it says that isingcut wrote it"
    return None if seal == found else "it was changed since isingcut wrote it"


# Locks -----------------------------------------------------------------------------------

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


# Headers and arrays ------------------------------------------------------------------------

LARGEST = 4 * 2**30
"""Bytes of the largest file that is read: the couplings of 20,000 blocks."""

Shape = tuple[int, ...]
Wanted = Callable[[Mapping[str, Shape]], Mapping[str, tuple[str, Shape]]]


def tensor_header(content: dict[str, Any]) -> dict[str, str]:
    """Metadata for a safetensors file: one key, because the library writes several in any order.

    Two files of the same content are then the same bytes.
    """
    return {"isingcut": json.dumps(content, sort_keys=True, allow_nan=False)}


def read_tensors(
    path: Path, kind: str, wanted: Wanted
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Header and arrays of a file that `tensor_header` began.

    Args:
        kind: of the header's document.
        wanted: for the shapes found, the dtype (in safetensors' words: ``"F64"``) and the shape
            that each array must have; others are not read.

    Raises:
        StageFileError: missing, no safetensors file, of another kind or a newer version, too
            large, or an array is missing, of another dtype or shape, or not finite.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    from isingcut.files import documents

    regular_file(path, f"the {kind} file", StageFileError, limit=LARGEST)
    arrays = {}
    try:
        with safe_open(path, framework="numpy") as file:
            header = parse_json((file.metadata() or {}).get("isingcut", "{}"))
            check_document(path, header, kind)
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
            for key, (dtype, shape) in wanted(shapes).items():
                if key not in slices:
                    raise documents.damaged(path, f"the tensor {key} is missing")
                found = (slices[key].get_dtype(), shapes[key])
                if found != (dtype, shape):
                    came = f"{found[0]} of shape {found[1]}"[:120]
                    expected = f"expected {dtype} of shape {shape}, got {came}"
                    raise documents.damaged(path, f"{key}: {expected}")
                arrays[key] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as e:
        raise documents.damaged(path, f"not a readable safetensors file ({e})") from e
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise documents.damaged(path, f"{key} holds values that are not finite")
    return header, arrays
