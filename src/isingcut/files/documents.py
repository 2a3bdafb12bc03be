"""Check the content of each JSON file of a run folder and of a cut checkpoint, by its kind.

A stage builds a document, `results.write_document` writes it and `results.read_document` reads it
back. The pydantic models are in the modules of the stages that write them: `states`, `cuts`,
`evaluations`, `healings`, `runs`. The headers of safetensors files (`results.read_tensors`) are
documents too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isingcut.errors import StageFileError

# Imported so that `KINDS` has their documents.
from isingcut.files import cuts, evaluations, healings, runs, states  # noqa: F401
from isingcut.files.schema import Document, Strict
from isingcut.files.values import Scalar

KINDS: dict[str, type[Document]] = {
    model.kind: model for model in Document.__subclasses__()
}
"""The pydantic model of each kind of document, by the KIND in its ``format``."""


def parse_content(path: Path, kind: str, content: dict[str, Any]) -> Document:
    """Parse the content of a document.

    Raises:
        StageFileError: a key is missing, or has a wrong type, size or range; the message names it.
    """
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged_error(
            path, f"{place}: {_words(first)}" if place else _words(first)
        ) from None


def check_blocks(path: Path, found: Any, blocks: int) -> None:
    """Check that a file of a run has the run's number of blocks.

    Args:
        found: a document, a `Spectrum` or a `Hamiltonian`; other objects have no blocks and pass.
        blocks: number of blocks in `run.json`.

    Raises:
        StageFileError: another number of blocks, or a block that the model does not have.
    """
    shape = getattr(getattr(found, "states", None), "shape", None)
    n = int(shape[1]) if shape else getattr(found, "n", getattr(found, "of", blocks))
    highest = max(_list_blocks(found), default=-1)
    if n != blocks:
        raise damaged_error(
            path, f"it is for {n} blocks, but the run's model has {blocks}"
        )
    if highest >= blocks:
        raise damaged_error(
            path, f"it names block {highest}; the run's model has {blocks} blocks"
        )


def _list_blocks(value: Any) -> Iterator[int]:
    """Yield every block number in a document; unknown keys and free dictionaries name none."""
    if isinstance(value, Strict):
        for key in type(value).model_fields:
            inner = getattr(value, key)
            yield from (inner or ()) if key == "removed" else _list_blocks(inner)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _list_blocks(inner)


def damaged_error(path: Path, what: str) -> StageFileError:
    """Return the error for a file with unusable content."""
    return StageFileError(
        f"{path} is damaged: {what}; restore the file, or delete it and run its stage again"
    )


def _words(error: Any) -> str:
    if error["type"] == "missing":
        return "missing"
    words = (
        str(error["msg"])
        .removeprefix("Value error, ")
        .replace("Input should be", "expected")
    )
    found = error["input"]
    return words + (f", got {repr(found)[:60]}" if isinstance(found, Scalar) else "")
