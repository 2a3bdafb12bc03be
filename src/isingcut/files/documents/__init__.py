"""What each JSON file of a run folder and of a cut checkpoint holds: one pydantic model a kind.

A stage builds the object, the file is its dump (`writing.write_document`), and who reads the file
(`writing.read_document`) has the object again. A model names what version 1 always has, with
types, sizes and ranges, so that whoever reads a document may rely on it. What else a file has is
let through: older and newer files of the same version still open. The headers of safetensors
files (`tensors`) are documents too.

`run` is `run.json`; `states` what all share, spectra, rankings and cuts; `scores` evaluations,
healings and benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isingcut.errors import StageFileError
from isingcut.files.documents import run, scores, states
from isingcut.files.documents.states import Document, Scalar, Strict

__all__ = ["KINDS", "Document", "Strict", "check_blocks", "damaged", "parse_content"]

KINDS: dict[str, type[Document]] = {
    model.kind: model
    for module in (run, scores, states)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, Document) and model.kind
}
"""The models by the kind in a document's ``format``, ``isingcut-KIND``."""


def parse_content(path: Path, kind: str, content: dict[str, Any]) -> Document:
    """The object of a document's content.

    Raises:
        StageFileError: a part is missing, or of a wrong type, size or range; the first is named.
    """
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{place}: {_words(first)}" if place else _words(first)) from None


def check_blocks(path: Path, found: Any, blocks: int) -> None:
    """Refuse the content of a run's file that is of another number of blocks than the run.

    Args:
        found: a document, a `Spectrum` or a `Hamiltonian`; anything else has no blocks.
        blocks: N of `run.json`.

    Raises:
        StageFileError: another N, or a block that the model does not have.
    """
    bits = getattr(found, "states", None)
    if isinstance(found, Document):
        n, highest = (
            getattr(found, "n", getattr(found, "of", blocks)),
            max(_named(found), default=-1),
        )
    else:
        n, highest = getattr(found, "n", blocks) if bits is None else int(bits.shape[1]), -1
    if n != blocks:
        raise damaged(path, f"it is over {n} blocks, the run's model has {blocks}")
    if highest >= blocks:
        raise damaged(path, f"it names block {highest}, the run's model has {blocks}")


def _named(value: Any) -> Iterator[int]:
    """Every block that a document names."""
    if isinstance(value, Strict):
        value = dict(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (inner or ()) if key == "removed" else _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def damaged(path: Path, what: str) -> StageFileError:
    """The error about a file whose content cannot be used."""
    return StageFileError(
        f"{path} is damaged: {what}; restore it, or delete it and run its stage again"
    )


def _words(error: Any) -> str:
    if error["type"] == "missing":
        return "it is missing"
    words = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    found = error["input"]
    return words + (f", got {repr(found)[:60]}" if isinstance(found, Scalar) else "")
