"""Results files: written to a temporary sibling and renamed, their format checked on reading."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isingcut.errors import InputError, StageFileError
from isingcut.files.inputs import load_json
from isingcut.files.outputs import check_output, mark, seal_of, sealed

if TYPE_CHECKING:
    from isingcut.files.documents import Document

D = TypeVar("D", bound="Document")

_VERSION = 1
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.isingcut-\w+\.(?P<kind>part|old)")
LOCK = "isingcut.lock"
"""The file in a folder to work in that `locks.locked` locks."""


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
        sources: what the content is made from, as in `outputs.check_output`.

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
    """The file that `locks.locked` locks for an output."""
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
    with atomic_file(path) as temporary:
        temporary.write_text(_text_of(kind, content, seal=seal), encoding="utf-8")


def write_sealed(path: Path, content: str) -> None:
    """Write Markdown or HTML that says in a comment at its end that isingcut wrote it."""
    with atomic_file(path) as temporary:
        temporary.write_text(sealed(content), encoding="utf-8")


def _text_of(kind: str, content: dict[str, Any], *, seal: bool = False) -> str:
    document = {"format": f"isingcut-{kind}", "version": _VERSION, **content}
    if seal:
        document["seal"] = seal_of(document)
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def write_document(path: Path, document: Document, *, seal: bool = False) -> None:
    """Write a document as the results file that `read_document` reads."""
    write_json(path, document.kind, document.content(), seal=seal)


def document_text(document: Document) -> str:
    """What `write_document` writes, unsealed."""
    return _text_of(document.kind, document.content())


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
