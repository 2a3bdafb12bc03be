"""Run folder to `report.md`, `report.json`, `report.html`; several folders to one comparison.

Reads files only, never a model. A file that is not there is said to be not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.files.outputs import check_output
from isingcut.files.writing import without_header, write_json, write_sealed
from isingcut.report.baselines import rival_row, rivals
from isingcut.report.choice import question_rows, questions_words
from isingcut.report.compare import comparison_page
from isingcut.report.fidelity import fidelity_rows, measured_words
from isingcut.report.page import report_page
from isingcut.report.provenance_rows import provenance_rows, timing_rows
from isingcut.report.read_run import read_run
from isingcut.report.render import render
from isingcut.report.rows import patch_rows
from isingcut.report.run_files import RunFiles
from isingcut.report.states import book
from isingcut.report.words import patch_story, patch_words, spectrum_map, spectrum_words


def write_report(folder: Path, target: Path | None = None) -> None:
    """Write `report.json`, `report.md` and `report.html` from what the run's files say.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    target = target or folder
    files = read_run(folder, target)
    markdown, data, page = _markdown(files), _data(files), report_page(files)
    texts = check_report(target)
    write_json(texts["json"], "report", data, seal=True)
    write_sealed(texts["md"], markdown)
    write_sealed(texts["html"], page)


def check_report(target: Path) -> dict[str, Path]:
    """The files of a report by their form, once it is known that they may be written.

    What a run wrote it may write again, as often as there is something new to report.

    Raises:
        OutputExistsError: a file of that name is not ours, or was changed since.
    """
    texts = {form: target / f"report.{form}" for form in ("json", "md", "html")}
    for file in texts.values():
        check_output(file, overwrite=True)
    return texts


def write_comparison(
    folders: Sequence[tuple[Path, Path]], out: Path, *, overwrite: bool = False
) -> list[str]:
    """Write one page that shows several runs side by side.

    Args:
        folders: for each run its folder, and where the files of the removal to show are.
        out: the HTML file.
        overwrite: replace a file that is there.

    Returns:
        What a reader must know before comparing; the page says it too.

    Raises:
        OutputExistsError: ``out`` is there and may not be replaced.
        StageFileError: a `run.json` is missing, or a file that is there is damaged.
    """
    check_output(out, overwrite=overwrite)
    runs = [read_run(folder, target) for folder, target in folders]
    page, warnings = comparison_page(runs)
    write_sealed(out, page)
    return warnings


def _markdown(files: RunFiles) -> str:
    spectrum, candidates, evaluation = files.spectrum, files.candidates, files.evaluation
    removed, asked = files.removed, (candidates or {}).get("by_tasks")
    return render(
        "report.md.j2",
        title=files.title,
        removed=removed,
        summary=files.summary,
        evaluation=evaluation,
        last=files.last,
        models=list(files.scores[0].values) if files.scores else [],
        scores=files.scores,
        patch_words="" if evaluation is None else patch_words(evaluation),
        patch=files.patch,
        patch_story=patch_story(files.patch) if files.patch else "",
        patch_rows=patch_rows(files.patch),
        candidates=candidates,
        measured_words="" if files.candidates is None else measured_words(files.candidates),
        fidelity=fidelity_rows(files.judged),
        asked=asked and (questions_words(asked), question_rows(asked)),
        warnings=files.warnings,
        rivals=[rival_row(rival) for rival in rivals(files, book(files))],
        won=files.won,
        spectrum=spectrum,
        spectrum_words="" if spectrum is None else spectrum_words(spectrum),
        marked=removed is not None
        and spectrum is not None
        and any(s["removed"] == removed for s in spectrum["states"]),
        map=[] if spectrum is None else spectrum_map(spectrum, candidates, removed),
        checkpoint=files.checkpoint,
        loads_with=files.loads_with,
        provenance=provenance_rows(files),
        timings=timing_rows(files.run, files.folder, files.target),
        run=files.arguments,
    )


def _data(files: RunFiles) -> dict[str, Any]:
    """The facts of the page as data."""
    return {
        "model": files.run["provenance"]["model"],
        "blocks": len(files.blocks),
        "removed": files.removed,
        "checkpoint": None if files.removal is None else ("healed" if files.healed else "model"),
        "not_run": files.not_run,
        "energy": {"name": files.energy, "meta": files.meta},
        "fidelity": files.judged,
        "warnings": files.warnings,
        "spectrum": _content(files.spectrum),
        "candidates": _content(files.candidates),
        "evaluation": _content(files.evaluation),
        "baselines": [without_header(b) for b in files.baselines],
        "patch": files.patch,
        "healing": _content(files.healing),
        "healed_candidates": _content(files.healed_candidates),
        "benchmarks": _content(files.benchmarks),
        "config": files.run["config"],
        "provenance": files.run["provenance"],
        "stages": files.run["stages"],
    }


def _content(document: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if document is None else without_header(document)
