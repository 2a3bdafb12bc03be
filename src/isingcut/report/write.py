"""Run folder to `report.md`, `report.json`, `report.html`; several folders to one comparison.

Reads files only, never a model. A file that is not there is said to be not there. Both pages are
laid out by templates from the same view. The HTML needs nothing but itself: everything is inside
the file, styles, the script, the figures and their data. A content security policy forbids the
page to fetch anything, and only the page's own script may run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.files.writing import check_output, write_json, write_sealed
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.report.blocks import (
    block_ticks,
    couplings_figure,
    dots,
    fields_figure,
    map_rows,
    margin_scale,
)
from isingcut.report.compare import comparison_page
from isingcut.report.figures import (
    AXES,
    healing_figure,
    scatter_figure,
    spectrum_figure,
    trade_off_figure,
)
from isingcut.report.render import render, render_page
from isingcut.report.rows import Row
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book, Rival, number_states, rivals
from isingcut.report.svg import Scale, whisker
from isingcut.report.words import fact_rows, table


def write_report(folder: Path, target: Path | None = None) -> None:
    """Write `report.json`, `report.md` and `report.html` from what the run's files say.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    files = RunFiles(folder, target)
    view, data = report_view(files), _facts(files)
    markdown = render("report.md.j2", **view)
    page = render_page("report.html.j2", **view, **_drawings(**view))
    texts = check_report(files.target)
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
    page, warnings = comparison_page([RunFiles(*places) for places in folders])
    write_sealed(out, page)
    return warnings


def report_view(files: RunFiles) -> dict[str, Any]:
    """What both pages are laid out from: the files, their states, and the methods that chose."""
    states = number_states(files)
    return {
        "files": files,
        "title": files.title,
        "states": states,
        "rivals": rivals(files, states),
        "provenance": fact_rows("provenance", files),
        "timings": table("timing_rows", files),
    }


def _facts(files: RunFiles) -> dict[str, Any]:
    """The facts of the page as data."""
    run, energy = files.run.content(), files.hamiltonian
    names = ("spectrum", "candidates", "evaluation", "patch", "healing")
    documents = {name: getattr(files, name) for name in (*names, "benchmarks")}
    return {
        "model": run["provenance"]["model"],
        "blocks": len(files.blocks),
        "removed": files.removed,
        "checkpoint": None if files.removal is None else files.product.name,
        "not_run": files.not_run,
        "energy": {"name": files.energy, "meta": None if energy is None else dict(energy.meta)},
        "fidelity": {name: found.content() for name, found in files.judged.items()},
        "warnings": files.warnings,
        "baselines": [found.content() for found in files.baselines],
        **{name: found and found.content() for name, found in documents.items()},
        **{name: run[name] for name in ("config", "provenance", "stages")},
    }


def _drawings(files: RunFiles, states: Book, rivals: Sequence[Rival], **_: Any) -> dict[str, Any]:
    """What the HTML page draws of a view."""
    energy, n = files.hamiltonian, len(files.blocks)
    rows, scale = map_rows(files, states)
    return {
        "n": n,
        "meter": _meter,
        "rows": rows,
        "scale": scale,
        "ticks": block_ticks(n),
        "fields": None if energy is None else fields_figure(energy, [b.kind for b in files.blocks]),
        "couplings": None if energy is None else couplings_figure(energy),
        "spectrum": spectrum_figure(files, states),
        "scatters": [
            scatter_figure(files, name, states) for name in files.judged if name in files.energies
        ],
        "trade_offs": [trade_off_figure(files, axis) for axis in AXES],
        "dots": dots,
        "rival_scale": margin_scale(files, [rival.state for rival in rivals]),
        "curve": None if files.healing is None else healing_figure(files.healing),
        "data": _page_data(files, states),
    }


def _meter(row: Row, model: str, models: Sequence[str]) -> str:
    """The bar under a figure, its length and whisker as properties for the CSS; empty for none."""
    value = row.values.get(model)
    whole = row.whole or max((v.high for m in models if (v := row.values.get(m))), default=0.0)
    if value is None or not whole or value.figure < 0:
        return ""
    scale = Scale(0.0, whole)
    if value.error is None:
        return f"--v:{scale(value.figure)}%"
    return whisker(scale, value.figure, value.low, value.high, "v")


def _page_data(files: RunFiles, states: Book) -> dict[str, Any]:
    """What the page's script knows: the blocks, the energy's terms and the states."""
    return {
        "n": len(files.blocks),
        "kinds": [b.kind for b in files.blocks],
        "parameters": [b.parameters for b in files.blocks],
        **_terms(files.hamiltonian),
        "states": [
            {
                "name": s.name,
                "removed": list(s.removed),
                "energy": s.energy,
                "kl": None if s.kl is None else s.kl.figure,
                "se": None if s.kl is None else s.kl.error,
                "chosen": s.chosen,
            }
            for s in states
        ],
    }


def _terms(energy: Hamiltonian | None) -> dict[str, Any]:
    if energy is None:
        return {"unit": "", **dict.fromkeys(("c", "h", "hError", "J", "JError"))}
    errors = {"hError": _short(energy.h_error, 2), "JError": _short(energy.J_error, 2)}
    terms = {"c": energy.c, "h": _short(energy.h), "J": _short(energy.J)}
    return {"unit": energy.unit, **terms, **errors}


def _short(values: Floats | None, digits: int = 4) -> Any:
    if values is None:
        return None
    return np.vectorize(lambda v: float(f"{v:.{digits}g}"), otypes=[float])(values).tolist()
