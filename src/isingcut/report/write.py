"""Run folder to `report.md`, `report.json`, `report.html`; several folders to one comparison.

Reads files only, never a model. A file that is not there is said to be not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.files import atomic_file, write_json
from isingcut.outputs import check_output, sealed
from isingcut.report.baselines import baseline_rows
from isingcut.report.card import model_card
from isingcut.report.compare import comparison_page
from isingcut.report.page import report_page
from isingcut.report.provenance_rows import provenance_rows, timing_rows
from isingcut.report.run_files import RunFiles, read_run, without_header
from isingcut.report.words import (
    comparison,
    fidelity_rows,
    removal_summary,
    render,
    spectrum_map,
    spectrum_words,
)

__all__ = ["model_card", "write_comparison", "write_report"]


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
    for name, content in (("md", markdown), ("html", page)):
        with atomic_file(texts[name]) as temporary:
            temporary.write_text(sealed(content, f".{name}"), encoding="utf-8")


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
    with atomic_file(out) as temporary:
        temporary.write_text(sealed(page, ".html"), encoding="utf-8")
    return warnings


def _markdown(files: RunFiles) -> str:
    spectrum, candidates, evaluation = files.spectrum, files.candidates, files.evaluation
    removed, total = files.removed, len(files.blocks)
    rows = provenance_rows(files.run, files.meta)
    return render(
        "report.md.j2",
        title=files.title,
        removed=removed,
        summary=removal_summary(
            removed, total, files.energy, files.meta, candidates, files.healed_candidates
        ),
        evaluation=evaluation,
        comparison=[] if evaluation is None else comparison(evaluation),
        candidates=candidates,
        fidelity=fidelity_rows(files.judged),
        warnings=files.warnings,
        baselines=baseline_rows(files.baselines, candidates, files.energy, files.meta, total),
        won=files.won,
        spectrum=spectrum,
        spectrum_words="" if spectrum is None else spectrum_words(spectrum),
        marked=removed is not None
        and spectrum is not None
        and any(s["removed"] == removed for s in spectrum["states"]),
        map=[] if spectrum is None else spectrum_map(spectrum, candidates, removed),
        checkpoint=files.checkpoint,
        provenance=[(key, value.replace("|", "\\|")) for key, value in rows],
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
        "spectrum": without_header(files.spectrum),
        "candidates": without_header(files.candidates),
        "evaluation": without_header(files.evaluation),
        "baselines": [without_header(b) for b in files.baselines],
        "healing": without_header(files.healing),
        "healed_candidates": without_header(files.healed_candidates),
        "benchmarks": without_header(files.benchmarks),
        "config": files.run["config"],
        "provenance": files.run["provenance"],
        "stages": files.run["stages"],
    }
