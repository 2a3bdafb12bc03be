"""Run folder to `report.md`, `report.json`, `report.html`; several folders to one comparison.

Reads files only, never a model. Missing files are reported as missing. Templates render both pages
from the same view. A comparison lists the differences between the runs first, and calls losses
comparable only if they were measured on the same tokens of the same model. The HTML file is
self-contained: styles, script, figures and data are inside it. A content security policy forbids
the page to fetch anything, and allows only the page's own script to run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.files.ownership import check_output
from isingcut.files.results import write_json, write_sealed
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.report import figures
from isingcut.report.card import gguf_card, harness_results
from isingcut.report.run_files import RunFiles
from isingcut.report.states import ReportState, list_rivals, number_states
from isingcut.report.words import paragraphs, render, sentence

_MODELS = ("original", "final")


def write_report(store: Store, target: Path | None = None) -> None:
    """Write `report.json`, `report.md` and `report.html` from the run's files.

    If the cut GGUF file was measured, also write its card, `model.gguf.md`; with benchmarks also
    `results_original.json` and `results_final.json`, as lm-evaluation-harness writes them.

    Args:
        store: the run folder.
        target: the folder with the files of one removal; by default the run folder.

    Raises:
        StageFileError: an existing file is damaged.
    """
    files = RunFiles(store, target)
    view = report_view(files)
    data = _facts(files)
    markdown = render("report.md.j2", **view)
    page = render("report.html.j2", **view, **_drawings(view))
    texts = check_report(files.target)
    write_json(texts["json"], "report", data, seal=True)
    write_sealed(texts["md"], markdown)
    write_sealed(texts["html"], page)
    if card := gguf_card(files):
        write_sealed(texts["card"], card)
    for name in _MODELS if files.benchmarks else ():
        write_json(texts[name], "scores", harness_results(files, name), seal=True)


def check_report(target: Path) -> dict[str, Path]:
    """Return the paths of a report's files by their form, after checking that they may be written.

    An unchanged report of isingcut may always be replaced.

    Raises:
        OutputExistsError: isingcut did not write a file of that name, or it was changed since.
    """
    texts = {form: target / f"report.{form}" for form in ("json", "md", "html")}
    texts["card"] = target / "model.gguf.md"
    texts |= {name: target / f"results_{name}.json" for name in _MODELS}
    for file in texts.values():
        check_output(file, overwrite=True)
    return texts


def report_view(files: RunFiles) -> dict[str, Any]:
    """Return the values for both templates: files, states, methods, provenance and timings."""
    states = number_states(files)
    return {
        "files": files,
        "title": files.title,
        "states": states,
        "rivals": list_rivals(files, states),
    }


def _facts(files: RunFiles) -> dict[str, Any]:
    """Return the content of `report.json`."""
    run = files.run.content()
    energy = files.hamiltonian
    stages = {
        "energy": energy,
        "solve": files.spectrum,
        "rank": files.candidates,
        "excise": files.removal,
        "evaluate": files.evaluation,
    }
    names = ["spectrum", "candidates", "evaluation", "patch", "healing", "benchmarks"]
    names += ["packing"] * (files.packing is not None)
    return {
        "model": run["provenance"]["model"],
        "blocks": len(files.blocks),
        "removed": files.removed,
        "checkpoint": files.removal and files.product.name,
        "not_run": [stage for stage, file in stages.items() if file is None],
        "energy": {"name": files.energy, "meta": energy and dict(energy.meta)},
        "fidelity": {name: judged.content() for name, judged in files.judged.items()},
        "warnings": files.warnings,
        "baselines": [baseline.content() for baseline in files.baselines],
        **{name: (file := getattr(files, name)) and file.content() for name in names},
        **{name: run[name] for name in ("config", "provenance", "stages")},
    }


def _drawings(view: dict[str, Any]) -> dict[str, Any]:
    """Return the figures and the script's data for the HTML page of a view."""
    files: RunFiles = view["files"]
    states: list[ReportState] = view["states"]
    energy = files.hamiltonian
    n = len(files.blocks)
    kinds = [b.kind for b in files.blocks]
    here = [f for f in files.removals if f.target == files.target]
    others = [f for f in files.removals if f.target != files.target]
    groups = [
        figures.Group("chosen", "this removal", here),
        figures.Group("candidate", "other removals", others),
    ]
    return {
        "n": n,
        "rows": figures.map_rows(states),
        "ticks": figures.block_ticks(n),
        "fields": energy and figures.draw_fields(energy, kinds),
        "couplings": energy and figures.draw_couplings(energy),
        "scatters": [
            figures.scatter_figure(files, name, states)
            for name in files.judged
            if name in files.energies
        ],
        "trade_offs": [
            figures.trade_off_figure(axis, groups, sentence("no_points", files, axis))
            for axis in figures.AXES
        ],
        "curve": files.healing and figures.healing_figure(files.healing),
        "data": {
            "n": n,
            "kinds": kinds,
            **(_terms(energy) if energy else {}),
            "states": [
                {"name": s.name, "removed": list(s.removed), "chosen": s.chosen}
                for s in states
            ],
        },
    }


def _terms(energy: Hamiltonian) -> dict[str, Any]:
    """Return the energy's terms for the page's script, in few digits."""
    J = _short(energy.J, 4)
    for i, j in np.argwhere(figures.unmeasured(energy)):
        J[i][j] = None
    return {
        "unit": energy.unit,
        "h": _short(energy.h, 4),
        "hError": _short(energy.h_error, 2),
        "J": J,
        "JError": _short(energy.J_error, 2),
    }


def _short(values: Floats | None, digits: int) -> Any:
    if values is None:
        return None
    return np.vectorize(lambda v: float(f"{v:.{digits}g}"))(values).tolist()


# Comparison -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One run of a comparison.

    Attributes:
        files: files of the run.
        name: name of its folder, with the parent folder if several runs have the same name.
        tone: number of its colour.
    """

    files: RunFiles
    name: str
    tone: int

    @property
    def text(self) -> str | None:
        """SHA-256 of the calibration tokens; equal if losses were measured on the same text."""
        return None if self.files.calibration is None else self.files.calibration.sha256

    @property
    def sha(self) -> str:
        """SHA-256 that identifies the model."""
        return self.files.run.provenance.model.sha256

    @property
    def sizes(self) -> list[RunFiles]:
        """The removals to list: all with a choice in the run folder, or the one that was named."""
        whole = self.files.removals if self.files.target == self.files.folder else []
        sizes = [self.files, *(f for f in whole if f.target != self.files.target)]
        return [f for f in sizes if f.removed is not None] or [self.files]


def write_comparison(
    folders: Sequence[tuple[Store, Path]], out: Path, *, overwrite: bool = False
) -> list[str]:
    """Write one page that compares several runs.

    Args:
        folders: for each run, the run folder and the folder with the files of the removal to show.
        out: the HTML file.
        overwrite: allow replacing an existing file.

    Returns:
        the warnings about the comparison, which are on the page too.

    Raises:
        OutputExistsError: ``out`` exists and may not be replaced.
        StageFileError: an existing file is damaged.
    """
    check_output(out, overwrite=overwrite)
    runs = _sides([RunFiles(*places) for places in folders])
    warnings = paragraphs("comparison_warnings", runs)
    groups = [
        figures.Group(f"tone-{run.tone}", run.name, run.files.removals, joined=True)
        for run in runs
    ]
    page = render(
        "compare.html.j2",
        title=f"{len(runs)} runs compared",
        runs=runs,
        differences=differences(runs),
        warnings=warnings,
        block_ticks=figures.block_ticks,
        trade_offs=[
            figures.trade_off_figure(axis, groups, "No run has measured this.")
            for axis in figures.AXES
        ],
        data={"n": 0, "kinds": [], "states": []},
    )
    write_sealed(out, page)
    return warnings


def _sides(runs: Sequence[RunFiles]) -> list[Side]:
    places = [files.target.resolve() for files in runs]
    often = Counter(place.name for place in places)
    sides = []
    for k, (files, place) in enumerate(zip(runs, places, strict=True)):
        parent = f"{place.parent.name}/" * (often[place.name] > 1)
        sides.append(Side(files, parent + place.name, k % 6))
    return sides


def differences(runs: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """List what differs between the runs: model, text or option, with the value in each run."""
    facts = []
    for run in runs:
        fact = {"model": f"{run.files.model} (SHA-256 {run.sha[:8]})"}
        fact["calibration text"] = "not there"
        if text := run.files.calibration:
            fact["calibration text"] = f"{text.source} (SHA-256 {text.sha256[:8]})"
        # These two come first, and hide options of the same name.
        facts.append(fact | run.files.run.config.content() | fact)
    different = []
    for key in dict.fromkeys(key for fact in facts for key in fact):
        values = [str(fact.get(key, "")) for fact in facts]
        if key != "calibration" and len(set(values)) > 1:
            different.append((key.replace("_", " "), values))
    return different
