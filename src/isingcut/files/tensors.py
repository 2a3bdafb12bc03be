"""The safetensors files of a run folder: one header that is a document, and named arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.errors import StageFileError
from isingcut.files import documents
from isingcut.files.inputs import parse_json, regular_file
from isingcut.files.writing import check_document

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
    from safetensors import SafetensorError, safe_open

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
                    raise documents.damaged(
                        path, f"{key}: expected {dtype} of shape {shape}, got {_told(*found)}"
                    )
                arrays[key] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as e:
        raise documents.damaged(path, f"not a readable safetensors file ({e})") from e
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise documents.damaged(path, f"{key} holds values that are not finite")
    return header, arrays


def _told(dtype: str, shape: Shape) -> str:
    return f"{dtype} of shape {shape}"[:120]
