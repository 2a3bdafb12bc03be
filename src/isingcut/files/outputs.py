"""What may be replaced: with `--overwrite` only what isingcut wrote, and never a source.

A folder that isingcut writes holds a marker file with the name and fingerprint of every file in
it, and a hash over these; a text file ends with a seal, the hash of what stands before it. What
has neither, or was changed since, is the user's and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, IsingcutError, OutputExistsError, StageFileError
from isingcut.files.inputs import load_json, read_text

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


def _hash(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


# Stages of a run folder ------------------------------------------------------------------


def check_recorded(stages: Mapping[str, Any], folder: Path, file: Path) -> None:
    """Refuse a file of a run folder that is not as the run wrote it.

    Args:
        stages: the records in its `run.json`.

    Raises:
        StageFileError: there is no record of it, its stage is not finished, or it was changed.
    """
    record = stages.get(str(file.relative_to(folder)))
    if record is None:
        raise StageFileError(f"{file} was not written by this run; move it away")
    if not record["done"]:
        raise StageFileError(f"{file} is not finished; run its stage again: {record['stage']}")
    changed = changed_since(file, record)
    if changed is not None:
        raise StageFileError(
            f"{file} was changed or damaged since the run wrote it ({changed}); "
            "delete it and run its stage again (other blocks are cut with --blocks)"
        )


def changed_since(file: Path, record: Mapping[str, Any]) -> str | None:
    """How a file or folder differs from what was recorded, in words; None where it does not.

    A stage that was interrupted recorded no hash, nor did earlier versions for folders.
    """
    recorded = record.get("sha256")
    if recorded is None:
        return None
    if file.is_dir():
        return changed_in(file, recorded)
    if not file.is_file():
        return "it is no plain file"
    return None if file_sha256(file) == recorded else "its hash is another"


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
    """Why a file is not one that isingcut wrote and nobody changed; None where it is."""
    ours = "nothing in it says that isingcut wrote it"
    try:
        text = read_text(path, "the output")
    except IsingcutError:
        return ours
    if path.suffix == ".json":
        return _foreign_json(text)
    body, _, last = text.removesuffix("\n").rpartition("\n")
    match = _SEAL.search(last)
    if match is None:
        return ours
    intact = hashlib.sha256(f"{body}\n".encode()).hexdigest() == match[1]
    return None if intact else "it was changed since isingcut wrote it"


def _foreign_json(text: str) -> str | None:
    try:
        document = json.loads(text)
        seal = document.pop("seal")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return "nothing in it says that isingcut wrote it"
    return None if seal == seal_of(document) else "it was changed since isingcut wrote it"


def seal_of(document: dict[str, object]) -> str:
    """The seal of a JSON document: the hash of all its other keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
