"""What each JSON file of a run folder and of a cut checkpoint holds: one pydantic model a kind.

A model names what version 1 always has, with types, sizes and ranges, so that whoever reads a
document may rely on it. What else a file has is let through: older and newer files of the same
version still open. `writing.read_json` checks every document here; the headers of safetensors
files (`tensors`) are documents too.

`run` is `run.json`; `states` spectra, rankings and cuts; `scores` evaluations, healings and
benchmarks; `parts` what they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isingcut.errors import StageFileError
from isingcut.files.documents import run, scores, states
from isingcut.files.documents.parts import Scalar, Strict

__all__ = ["KINDS", "Strict", "check_content", "damaged", "fit"]

KINDS: dict[str, type[Strict]] = {
    "run": run.RunFile,
    "spectrum": states.SpectrumFile,
    "candidates": states.CandidatesFile,
    "evaluation": scores.EvaluationFile,
    "baseline": states.BaselineFile,
    "healing": scores.HealingFile,
    "healing-before": scores.HealedScores,
    "healing-patched": scores.PatchScores,
    "healing-work": scores.HealingWork,
    "healing-curve": scores.HealingCurve,
    "healing-recipe": scores.HealingRecipe,
    "healing-memory": scores.HealingMemory,
    "healed-candidate": scores.HealedCandidate,
    "healed-candidates": scores.HealedCandidates,
    "benchmarks": scores.BenchmarksFile,
    "scores": scores.KeptScores,
    "report": Strict,
    "removal": states.CutRecord,
    "hamiltonian": states.HamiltonianHeader,
    "calibration": states.CalibrationHeader,
}
"""The models by the kind in a document's ``format``, ``isingcut-KIND``."""


def check_content(path: Path, kind: str, document: dict[str, Any]) -> None:
    """Refuse a document that is not what its kind holds.

    Raises:
        StageFileError: a part is missing, or of a wrong type, size or range; the first is named.
    """
    try:
        KINDS[kind].model_validate(document)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{place}: {_words(first)}" if place else _words(first)) from None


def fit(path: Path, found: Any, blocks: int) -> None:
    """Refuse the content of a run's file that is of another number of blocks than the run.

    Args:
        found: a document, a `Spectrum` or a `Hamiltonian`; anything else has no blocks.
        blocks: N of `run.json`.

    Raises:
        StageFileError: another N, or a block that the model does not have.
    """
    if isinstance(found, dict):
        n = found.get("n", found.get("of", blocks))
        highest = max(_named(found), default=-1)
    else:
        bits = getattr(found, "states", None)
        n = getattr(found, "n", blocks) if bits is None else int(bits.shape[1])
        highest = -1
    if n != blocks:
        raise damaged(path, f"it is over {n} blocks, the run's model has {blocks}")
    if highest >= blocks:
        raise damaged(path, f"it names block {highest}, the run's model has {blocks}")


def _named(value: Any) -> Iterator[int]:
    """Every block that a document names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "removed":
                yield from inner
            elif key == "merges":
                yield from (b for group in inner for b in group)
            else:
                yield from _named(inner)
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
