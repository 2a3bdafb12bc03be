"""Distinguish isingcut's files from user files, so that no user file is replaced.

With `--overwrite`, isingcut replaces only its own files, and never a source. A folder that isingcut
writes has a marker file with the name and fingerprint of every file in it, and a hash over these. A
text file ends with a seal, the hash of the text before it. Files without marker or seal, and files
that were changed later, are user files and are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from isingcut.console.progress import Progress, silent
from isingcut.errors import InputError, IsingcutError, OutputExistsError, StageFileError
from isingcut.files.inputs import load_json, parse_json, read_text

if TYPE_CHECKING:
    from isingcut.files.runs import StageRecord

MARKER = ".isingcut-output.json"
_EDGE = 1 << 20
_PART = 1 << 24
_LARGE = 2 << 30
_SEAL = re.compile(r"\bisingcut-seal:([0-9a-f]{64})\b")


def check_output(
    path: Path, *, overwrite: bool, sources: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Raise if an output must not be written to ``path``.

    Args:
        path: a file or folder; it need not exist.
        overwrite: whether an output of isingcut may be replaced.
        sources: the inputs of this command and its run: model, teacher, GGUF, text, config.

    Raises:
        InputError: ``path`` is, contains or lies in a source, even with ``overwrite``.
        OutputExistsError: ``path`` exists, and ``overwrite`` is false or it has user files.
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
        InputError: the output is, contains or lies in a source; the message has both paths.
    """
    real = Path(os.path.realpath(path))
    for source in filter(os.path.lexists, map(Path, sources)):
        read = Path(os.path.realpath(source))
        hard_link = False
        with contextlib.suppress(OSError):
            hard_link = path.samefile(source)
        if real == read or hard_link:
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


# Folders --------------------------------------------------------------------------------


def mark(folder: Path) -> None:
    """Write the marker file of a complete folder."""
    names = sorted(_files_in(folder) - {MARKER})
    files = {name: edges_sha256(folder / name) for name in names}
    (folder / MARKER).write_text(_marker(files), encoding="utf-8")


def _marker(files: Mapping[str, str]) -> str:
    content = {
        "format": "isingcut-output",
        "version": 1,
        "files": files,
        "sha256": hash_of(files),
    }
    return json.dumps(content, indent=1) + "\n"


def marker_with(folder: Path, name: str, new: Path) -> str | None:
    """Return the text of a marker for a new version of a file; None if a user edited the old one.

    Replace the marker, then the file. A kill between the two leaves the marker of the new version,
    which is recognised here.
    """
    files = _read_marker(folder) or {}
    version = edges_sha256(new)
    if files.get(name) not in (version, edges_sha256(folder / name)):
        return None
    return _marker({**files, name: version})


def _read_marker(folder: Path) -> dict[str, str] | None:
    """Read the files and fingerprints in a folder's marker; None if it is missing or damaged."""
    try:
        document = load_json(folder / MARKER, "the marker")
        files = document["files"]
        whole = document["format"] == "isingcut-output" and document[
            "sha256"
        ] == hash_of(files)
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
    own = present - {MARKER}
    if more := own - files.keys():
        return f"isingcut did not write {_some(more)} in it"
    return _describe_changes(folder, files, own)


def _describe_changes(
    folder: Path, files: Mapping[str, str], names: Iterable[str]
) -> str | None:
    changed = {name for name in names if edges_sha256(folder / name) != files[name]}
    return f"{_some(changed)} in it was changed" if changed else None


def folder_hash(folder: Path) -> str | None:
    """Return the hash in a folder's marker, without Markdown; None if it is missing or damaged."""
    files = _read_marker(folder)
    if files is None:
        return None
    return hash_of({k: v for k, v in files.items() if not k.endswith(".md")})


def find_change(folder: Path, recorded: str, *, gone: bool = True) -> str | None:
    """Describe the changes in a folder since its hash was recorded; None for no change.

    Added files and Markdown do not count: users may edit a model card.

    Args:
        gone: whether deleted files count as changes.
    """
    files = _read_marker(folder)
    if files is None or folder_hash(folder) != recorded:
        return f"its {MARKER} was changed"
    checked = [n for n in files if not n.endswith(".md")]
    there = [n for n in checked if gone or (folder / n).exists()]
    return _describe_changes(folder, files, there)


def refuse_changed(folder: Path) -> None:
    """Raise if a file other than Markdown was edited in a folder that isingcut wrote.

    Raises:
        InputError: a file was edited; the message names it.
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
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def edges_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's size and its first and last MiB, to read large files fast."""
    if path.is_symlink() or not path.is_file():
        return "not a regular file"
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        digest.update(f.read(_EDGE))
        f.seek(max(0, size - _EDGE))
        digest.update(f.read(_EDGE))
    return digest.hexdigest()


def hash_of(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of a JSON object, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Stages of a run folder ------------------------------------------------------------------


def check_recorded(
    record: StageRecord | None, file: Path, progress: Progress = silent
) -> None:
    """Raise if a file of a run folder differs from its record in `run.json`.

    Raises:
        StageFileError: the file has no record, its stage is unfinished, or it was changed.
    """
    if record is None:
        raise StageFileError(f"{file} was not written by this run; move it away")
    if not record.done:
        raise StageFileError(
            f"{file} is not finished; run its stage again: {record.stage}"
        )
    changed = find_change_since(file, record, progress)
    if changed is not None:
        raise StageFileError(
            f"{file} was changed or damaged after the run wrote it ({changed}); "
            "delete it and run its stage again (other blocks are cut with --blocks)"
        )


def find_change_since(
    file: Path, record: StageRecord, progress: Progress = silent
) -> str | None:
    """Describe how a file or folder differs from its record; None if it does not.

    Interrupted stages have no hash: no change is found.
    """
    if record.sha256 is None:
        return None
    if file.is_dir():
        return find_change(file, record.sha256)
    if not file.is_file():
        return "it is not a regular file"
    return None if file_sha256(file, progress) == record.sha256 else "its hash differs"


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 of a file's bytes; show progress for a file that takes seconds."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    shown = progress if size > _LARGE else silent
    with path.open("rb") as f, shown(f"hashing {path.name}", size) as bar:
        while part := f.read(_PART):
            digest.update(part)
            bar.advance(len(part))
    return digest.hexdigest()


# Text files -----------------------------------------------------------------------------


def _foreign_file(path: Path) -> str | None:
    """Explain why a file is not an unchanged file of isingcut; None if it is one.

    The seal of a JSON document is the hash of all its other keys.
    """
    try:
        text = read_text(path, "the output")
        if path.suffix == ".json":
            document = parse_json(text)
            seal = document.pop("seal")
            own = hash_of(document)
        else:
            body, _, last = text.removesuffix("\n").rpartition("\n")
            own = hashlib.sha256(f"{body}\n".encode()).hexdigest()
            seal = _SEAL.findall(last)[0]
    except (IsingcutError, ValueError, LookupError, AttributeError, TypeError):
        return "it has no seal of isingcut"
    return None if seal == own else "it was changed after isingcut wrote it"
