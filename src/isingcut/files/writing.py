"""Write files and folders atomically, under a lock, and never over files of yours.

Results files are written to a temporary sibling and renamed; reading checks their format. With
`--overwrite`, isingcut replaces only its own files, and never a source. A folder that isingcut
writes has a marker file with the name and fingerprint of every file in it, and a hash over these. A
text file ends with a seal, the hash of the text before it. Files without either, or changed later,
are yours and stay. One process at a time writes to a place, under a lock of the operating system; a
killed process leaves only the lock's file. Readers take no lock.
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
"""The lock file in a work folder."""


@contextlib.contextmanager
def clear_os_errors(target: Path) -> Iterator[None]:
    """Convert errors of the operating system, while ``target`` is written, to one clear line.

    Raises:
        InputError: the disk is full or failing, or the place is not writable or does not exist.
    """
    try:
        yield
    except Exception as e:
        # torch's writer reports where it stopped, but not why.
        stopped = any(said in str(e) for said in ("PytorchStreamWriter failed", "unexpected pos"))
        if (code := _code_of(e)) in (errno.ENOSPC, errno.EDQUOT) or stopped:
            raise InputError(
                f"no space left on the disk, {target} was not written; free some space or choose "
                "another --out, then run the same command again"
            ) from e
        # A missing file may be an input; memory and pipes have messages of their own.
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
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
    ]
    why = (error.strerror or str(error) or type(error).__name__).strip()
    return f"{' and '.join(places)}: {why}" if places else why


def _code_of(error: Exception) -> int:
    """Return the errno of an error.

    For errors of Rust libraries and of `copytree`, it is in the message.
    """
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.errno or 0
    worded = isinstance(error, shutil.Error) or type(error).__name__ == "SafetensorError"
    found = _CODE.search(str(error)) if worded else None
    return int(found[1]) if found else 0


_CODE = re.compile(r"(?:os error |\[Errno )(\d+)")


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
    path: Path, *, overwrite: bool = False, sources: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Yield a temporary sibling folder; it is marked and renamed to ``path`` on success.

    Args:
        overwrite: allow replacing an output of isingcut at ``path``.
        sources: the files that the content is made from, as in `check_output`.

    Raises:
        InputError: ``path`` is, contains or lies in a source.
        OutputExistsError: ``path`` exists, and ``overwrite`` is false or it has files of yours.
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
            if os.path.lexists(path):
                # It may exist by now.
                check_output(path, overwrite=overwrite, sources=sources)
                # Move the old folder aside first: a kill between the two renames leaves one whole
                # folder under a recognisable name, not a mixture.
                aside = Path(tempfile.mkdtemp(".old", temporary_prefix(path), path.parent))
                os.replace(path, aside / path.name)
                os.replace(temporary, path)
                shutil.rmtree(aside)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a file or folder; a kill leaves it whole, or no longer in its place."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = Path(tempfile.mkdtemp(".old", temporary_prefix(path), path.parent))
    os.replace(path, aside / path.name)
    shutil.rmtree(aside)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is deleted by the process that made it, and not by a fork of it."""
    made_by, folder = os.getpid(), Path(tempfile.mkdtemp(prefix="isingcut-"))
    try:
        yield folder
    finally:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_prefix(path: Path) -> str:
    """Return the beginning of the name of a temporary sibling."""
    return f".{path.name}.isingcut-"


def lock_beside(path: Path) -> Path:
    """Return the lock file of an output."""
    return path.with_name(f".{path.name}.isingcut.lock")


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is a temporary file or folder of isingcut, or a lock file."""
    return path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders of killed processes; the caller must have the lock.

    An old folder that was moved aside is restored if the new one did not replace it.

    Args:
        name: delete only siblings of this file or folder; by default, all but those of an output
            with its own lock.
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
        seal: add a seal, for a file that no `run.json` records.
    """
    document = {"format": f"isingcut-{kind}", "version": _VERSION, **content}
    if seal:
        document["seal"] = _hash(document)
    with atomic_file(path) as temporary:
        text = json.dumps(document, indent=1, allow_nan=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_sealed(path: Path, content: str) -> None:
    """Write Markdown or HTML with a seal, a comment in the last line."""
    body = content if content.endswith("\n") else content + "\n"
    seal = f"<!-- isingcut-seal:{hashlib.sha256(body.encode()).hexdigest()} -->\n"
    with atomic_file(path) as temporary:
        temporary.write_text(body + seal, encoding="utf-8")


def write_document(path: Path, document: Document, *, seal: bool = False) -> None:
    """Write a document to a results file, for `read_document`."""
    write_json(path, document.kind, document.content(), seal=seal)


def read_document(path: Path, model: type[D]) -> D:
    """Read the document in a results file, see `documents`.

    Raises:
        StageFileError: the file is missing, not JSON, of another kind or a newer version, or
            damaged.
    """
    found = check_document(path, _load(path), model.kind)
    assert isinstance(found, model)
    return found


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Read and check a results file; return it as plain JSON with its header."""
    document = _load(path)
    check_document(path, document, kind)
    assert isinstance(document, dict)
    return document


def _load(path: Path) -> Any:
    if not os.path.lexists(path):
        raise StageFileError(f"the file {path} does not exist; run the stage that writes it first")
    return load_json(path, "the results file", StageFileError)


def check_document(path: Path, document: Any, kind: str) -> Document:
    """Check a document and return its content.

    Raises:
        StageFileError: another format, a newer version, or damaged content.
    """
    # Imported here because building the models takes 50 ms.
    from isingcut.files import documents

    found = document.get("format") if isinstance(document, dict) else None
    if found != f"isingcut-{kind}":
        raise StageFileError(
            f"{path} is not an isingcut {kind} file (expected format 'isingcut-{kind}', "
            f"found {repr(found)[:60]}); give the right file, or delete it and run its stage again"
        )
    written = document.get("version")
    if type(written) is not int or written < 1:
        raise documents.damaged_error(path, f"version: expected 1 or more, got {written!r:.60}")
    if written > _VERSION:
        raise StageFileError(
            f"{path} was written by a newer isingcut (file version {written}, "
            f"this one reads up to {_VERSION}); upgrade isingcut"
        )
    return documents.parse_content(path, kind, without_header(document))


def without_header(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a results file without its format and version."""
    return {k: v for k, v in document.items() if k not in ("format", "version")}


def without_infinities(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: without_infinities(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(v) for v in value]
    return value


def fingerprint(content: Any) -> str:
    """Return a short SHA-256 of a JSON-able value, independent of key order."""
    encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


# What may be replaced ---------------------------------------------------------------------

MARKER = ".isingcut-output.json"

_EDGE = 1 << 20
_SEAL = re.compile(r"\bisingcut-seal:([0-9a-f]{64})\b")


def check_output(
    path: Path, *, overwrite: bool, sources: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Raise if an output must not be written to ``path``.

    Args:
        path: a file or folder; it need not exist.
        overwrite: allow replacing an output of isingcut.
        sources: the inputs of this command and its run: model, teacher, GGUF, text, config.

    Raises:
        InputError: ``path`` is, contains or lies in a source, even with ``overwrite``.
        OutputExistsError: it exists, and ``overwrite`` is false or it has files of yours.
    """
    refuse_source(path, sources)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(
            f"the output {path} already exists, nothing was written; choose another place, or "
            "replace it with --overwrite (overwrite=True)"
        )
    foreign = foreign_in(path) if path.is_dir() else _foreign_file(path)
    if foreign is not None:
        raise OutputExistsError(
            f"the output {path} is not replaced: {foreign}, and --overwrite replaces only files "
            "of isingcut; move it away or choose another --out"
        )


def refuse_source(path: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise if an output is, contains or lies in a source.

    Links are resolved; a hard link to a source file counts as that file.

    Raises:
        InputError: with both paths.
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
            f"the output {path} {how} {source}, an input of this command; nothing was written: "
            "choose another place for the output"
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as e:
        raise InputError(f"cannot resolve {path}: {e}; give a path without such links") from e


def _same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


# Folders --------------------------------------------------------------------------------


def mark(folder: Path) -> None:
    """Write the marker of a complete folder."""
    files = {name: edges_sha256(folder / name) for name in sorted(_files_in(folder))}
    files.pop(MARKER, None)
    content = {"format": "isingcut-output", "version": 1, "files": files, "sha256": _hash(files)}
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_marker(folder: Path) -> dict[str, str] | None:
    """Read the files and fingerprints in a folder's marker; None if it is missing or damaged."""
    try:
        document = load_json(folder / MARKER, "the marker")
        files = document["files"]
        whole = document["format"] == "isingcut-output" and document["sha256"] == _hash(files)
    except (IsingcutError, KeyError, TypeError):
        return None
    return files if whole and isinstance(files, dict) else None


def foreign_in(folder: Path) -> str | None:
    """Describe the files of a folder that isingcut did not write; None if there are none.

    An empty folder has no such files.
    """
    present = _files_in(folder)
    if not present:
        return None
    files = _read_marker(folder)
    if files is None:
        if MARKER in present:
            return f"its {MARKER} was changed"
        return f"it has {_some(present)} and no marker of isingcut"
    if more := present - files.keys() - {MARKER}:
        return f"isingcut did not write {_some(more)} in it"
    changed = {name for name in present - {MARKER} if files[name] != edges_sha256(folder / name)}
    return f"{_some(changed)} in it was changed" if changed else None


def folder_hash(folder: Path) -> str | None:
    """Return the hash in a folder's marker; None if the marker is missing or damaged."""
    files = _read_marker(folder)
    return None if files is None else _hash(files)


def find_change(folder: Path, recorded: str, *, gone: bool = True) -> str | None:
    """Describe the changes in a folder since its hash was recorded; None for no change.

    Added files do not count, nor does Markdown: you may edit a model card.

    Args:
        gone: whether deleted files count.
    """
    files = _read_marker(folder)
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
    """Raise if a file but Markdown was edited in a folder that isingcut wrote.

    Raises:
        InputError: with the edited file.
    """
    if not (folder / MARKER).is_file():
        return
    changed = find_change(folder, folder_hash(folder) or "", gone=False)
    if changed is not None:
        raise InputError(
            f"{folder} was changed after isingcut wrote it: {changed}; write it again, or delete "
            f"its {MARKER} to use it as it is"
        )


def _some(names: set[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _files_in(folder: Path) -> set[str]:
    """Return the relative names of all files and empty folders below a folder."""
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
    """Return the SHA-256 of a file's size and of its first and last MiB, to save time."""
    if path.is_symlink() or not path.is_file():
        return "not a regular file"
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
    """Raise if a file of a run folder differs from what the run wrote.

    Args:
        stages: the records in `run.json`.

    Raises:
        StageFileError: the file has no record, its stage is unfinished, or it was changed.
    """
    record = stages.get(str(file.relative_to(folder)))
    if record is None:
        raise StageFileError(f"{file} was not written by this run; move it away")
    if not record.done:
        raise StageFileError(f"{file} is not finished; run its stage again: {record.stage}")
    changed = find_change_since(file, record)
    if changed is not None:
        raise StageFileError(
            f"{file} was changed or damaged after the run wrote it ({changed}); "
            "delete it and run its stage again (other blocks are cut with --blocks)"
        )


def find_change_since(file: Path, record: StageRecord) -> str | None:
    """Describe how a file or folder differs from its record; None if it does not.

    An interrupted stage has no hash, and nor have folders in records of older versions.
    """
    if record.sha256 is None:
        return None
    if file.is_dir():
        return find_change(file, record.sha256)
    if not file.is_file():
        return "it is not a regular file"
    return None if file_sha256(file) == record.sha256 else "its hash differs"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Text files -----------------------------------------------------------------------------


def _foreign_file(path: Path) -> str | None:
    """Explain why a file is not an unchanged file of isingcut; None if it is one.

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
        return "it has no seal of isingcut"
    return None if seal == found else "it was changed after isingcut wrote it"


# Locks -----------------------------------------------------------------------------------

# The errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
_HOLDER = re.compile(r"(pid \d+, host .+) since (\S+ \S+)\n")

_held: set[tuple[int, int, Path]] = set()


@contextlib.contextmanager
def lock_place(place: Path, *, inside: bool = False, wait: bool = False) -> Iterator[bool]:
    """Lock ``place``, which need not exist, so that no other process writes to it.

    Half-written files of killed processes are deleted first.

    Args:
        inside: ``place`` is a work folder with the lock file in it. Otherwise ``place`` is an
            output, and the lock file is a hidden sibling.
        wait: wait for another process instead of raising an error.

    Yields:
        False if this thread has the lock already.

    Raises:
        BusyError: another process, or another thread, writes there.
        InputError: the place is not writable.
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
        # If the lock file cannot be written, the output cannot either.
        return
    with contextlib.suppress(OSError):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write_text(f"pid {os.getpid()}, host {platform.node()} since {now}\n")


def _who(file: Path, place: Path) -> str:
    """Describe the process that works in a place, from the lock file."""
    found = None
    with contextlib.suppress(InputError):
        found = _HOLDER.fullmatch(read_text(file, "the lock", limit=1000))
    who, since = (f" ({found[1]})", f" since {found[2]}") if found else ("", "")
    return f"another isingcut{who} is writing to {place}{since}; wait for it, or stop it"


@functools.cache
def _say_no_locks(folder: Path) -> None:
    say(
        f"isingcut: warning: the file system of {folder} does not support locks; "
        "do not start a second isingcut there"
    )


# Headers and arrays ------------------------------------------------------------------------

LARGEST = 4 * 2**30
"""Largest file to read, in bytes: the couplings of 20,000 blocks."""

Shape = tuple[int, ...]
Wanted = Callable[[Mapping[str, Shape]], Mapping[str, tuple[str, Shape]]]


def tensor_header(content: dict[str, Any]) -> dict[str, str]:
    """Make the metadata of a safetensors file: one key, because the library does not sort keys.

    Two files of the same content then have the same bytes.
    """
    return {"isingcut": json.dumps(content, sort_keys=True, allow_nan=False)}


def read_tensors(
    path: Path, kind: str, wanted: Wanted
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read the header and the arrays of a file with a `tensor_header`.

    Args:
        kind: the kind of the header's document.
        wanted: maps the shapes in the file to the dtype (as in safetensors, ``"F64"``) and shape
            that each array must have; other arrays are not read.

    Raises:
        StageFileError: the file is missing, not a safetensors file, of another kind or a newer
            version, or too large; or an array is missing, not finite, or of another dtype or shape.
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
                    raise documents.damaged_error(path, f"the tensor {key} is missing")
                found = (slices[key].get_dtype(), shapes[key])
                if found != (dtype, shape):
                    came = f"{found[0]} of shape {found[1]}"[:120]
                    expected = f"expected {dtype} of shape {shape}, got {came}"
                    raise documents.damaged_error(path, f"{key}: {expected}")
                arrays[key] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as e:
        raise documents.damaged_error(path, f"it is not a readable safetensors file ({e})") from e
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise documents.damaged_error(path, f"the tensor {key} has values that are not finite")
    return header, arrays
