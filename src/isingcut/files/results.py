"""Write and read results files: JSON documents, sealed text, and arrays with a header.

Files are written atomically. Reading checks their format, their version and their content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
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
_VERSION = 1


def write_json(
    path: Path, kind: str, content: dict[str, Any], *, seal: bool = False
) -> None:
    """Write ``content`` as an isingcut results file of the given kind.

    Args:
        seal: whether to add a seal, for a file without a record in a `run.json`.
    """
    document = {"format": f"isingcut-{kind}", "version": _VERSION, **content}
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
        raise StageFileError(
            f"the file {path} does not exist; run the stage that writes it first"
        )
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
        raise documents.damaged_error(
            path, f"version: expected 1 or more, got {written!r:.60}"
        )
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
    encoded = json.dumps(
        content, sort_keys=True, separators=(",", ":"), default=str
    ).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]


# Headers and arrays ------------------------------------------------------------------------

LARGEST = 4 * 2**30
"""Largest file to read, in bytes: the couplings of 20,000 blocks."""
Shape = tuple[int, ...]
Wanted = Callable[[Mapping[str, Shape]], Mapping[str, tuple[str, Shape]]]


def write_tensors(
    path: Path, kind: str, arrays: Mapping[str, npt.NDArray[Any]], **content: Any
) -> None:
    """Write a safetensors file of arrays with a header of the given kind and content."""
    import numpy as np
    from safetensors.numpy import save

    document = {"format": f"isingcut-{kind}", "version": _VERSION, **content}
    # One key, because the library does not sort keys: equal contents have equal bytes.
    header = {"isingcut": json.dumps(document, sort_keys=True, allow_nan=False)}
    packed = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    with atomic_file(path) as temporary:
        # Not by `save_file` of safetensors, which hides errors of the operating system.
        temporary.write_bytes(save(packed, header))


def read_tensors(
    path: Path, kind: str, wanted: Wanted
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read the header and the arrays of a file of `write_tensors`.

    Args:
        kind: the kind of the header's document.
        wanted: function from the shapes in the file to the dtype (as in safetensors, ``"F64"``) and
            shape that each array must have; other arrays are not read.

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
        raise documents.damaged_error(
            path, f"it is not a readable safetensors file ({e})"
        ) from e
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise documents.damaged_error(
                path, f"the tensor {key} has values that are not finite"
            )
    return header, arrays
