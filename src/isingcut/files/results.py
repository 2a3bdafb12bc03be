"""Write and read results files: JSON documents, sealed text, and arrays with a header.

Files are written atomically. Reading checks their format, their version and their content. The
pydantic model of each kind of document is in the module of the stages that write it: `states`,
`cuts`, `evaluations`, `healings`, `runs`. The headers of safetensors files are documents too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isingcut.errors import StageFileError
from isingcut.files.inputs import load_json, parse_json, regular_file
from isingcut.files.ownership import hash_of
from isingcut.files.writing import atomic_file

if TYPE_CHECKING:
    import numpy.typing as npt

    from isingcut.files.schema import Document

D = TypeVar("D", bound="Document")


def write_json(
    path: Path,
    kind: str,
    content: dict[str, Any],
    *,
    version: int = 1,
    seal: bool = False,
) -> None:
    """Write ``content`` as an isingcut results file of the given kind.

    Args:
        seal: whether to add a seal, for a file without a record in a `run.json`.
    """
    document = {"format": f"isingcut-{kind}", "version": version, **content}
    if seal:
        document["seal"] = hash_of(document)
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
    content = document.content()
    write_json(path, document.kind, content, version=document.version, seal=seal)


def read_document(path: Path, model: type[D]) -> D:
    """Read the document in a results file.

    Raises:
        StageFileError: the file is missing, not JSON, of another kind or a newer version, or
            damaged; the message names the key.
    """
    return _parse(path, load_json(path, "the results file", StageFileError), model)


def _parse(path: Path, document: Any, model: type[D]) -> D:
    """Check a document with its header, and return its content."""
    # Imported here because `--help` does not need it.
    from pydantic import ValidationError

    header = document if isinstance(document, dict) else {}
    kind = f"isingcut-{model.kind}"
    if header.get("format") != kind:
        raise StageFileError(
            f"{path} is not an isingcut {model.kind} file (expected format {kind!r}, "
            f"found {repr(header.get('format'))[:60]}); give the right file, or delete it and run "
            "its stage again"
        )
    written = header.get("version")
    if type(written) is not int or written < 1:
        raise damaged_error(path, f"version: expected 1 or more, got {written!r:.60}")
    if written != model.version:
        newer = written > model.version
        raise StageFileError(
            f"{path} was written by {'a newer' if newer else 'an older'} isingcut (file version "
            f"{written}, this one reads {model.version}); "
            + ("upgrade isingcut" if newer else "make it again in a new folder")
        )
    content = {k: v for k, v in header.items() if k not in ("format", "version")}
    try:
        return model.model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        words = first["msg"].removeprefix("Value error, ")
        words = words.replace("Input should be", "expected")
        if first["type"] == "missing":
            words = "missing"
        elif isinstance(first["input"], str | int | float | None):
            words += f", got {repr(first['input'])[:60]}"
        place = ".".join(map(str, first["loc"]))
        raise damaged_error(path, f"{place}: {words}" if place else words) from None


def damaged_error(path: Path, what: str) -> StageFileError:
    """Return the error for a file with unusable content."""
    return StageFileError(
        f"{path} is damaged: {what}; restore the file, or delete it and run its stage again"
    )


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
    encoded = json.dumps(
        content, sort_keys=True, separators=(",", ":"), default=str
    ).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


# Headers and arrays ------------------------------------------------------------------------

LARGEST = 4 * 2**30
"""Largest file to read, in bytes: the couplings of 20,000 blocks."""


def write_tensors(
    path: Path, kind: str, tensors: Mapping[str, npt.NDArray[Any]], **content: Any
) -> None:
    """Write arrays, and a header of a kind with this content, to a safetensors file.

    Two files of the same content have the same bytes.
    """
    import numpy as np
    from safetensors.numpy import save

    header = {"format": f"isingcut-{kind}", "version": 1, **content}
    # One key, because the library does not sort keys.
    metadata = {"isingcut": json.dumps(header, sort_keys=True, allow_nan=False)}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_file(path) as temporary:
        # Not by `save_file` of safetensors, which hides errors of the operating system.
        temporary.write_bytes(save(arrays, metadata))


def read_tensors(
    path: Path, model: type[D]
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read the header and the arrays of a file that `write_tensors` wrote.

    Args:
        model: the document of the header. The caller checks the arrays.

    Raises:
        StageFileError: the file is missing, not a safetensors file, of another kind or a newer
            version, or too large.
    """
    from safetensors import SafetensorError, safe_open

    regular_file(path, f"the {model.kind} file", StageFileError, limit=LARGEST)
    try:
        with safe_open(path, framework="numpy") as file:
            header = parse_json((file.metadata() or {}).get("isingcut", "{}"))
            _parse(path, header, model)
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise damaged_error(path, f"it is not a readable safetensors file ({e})") from e
