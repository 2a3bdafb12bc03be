"""`report.html`: one page per run that needs nothing but itself.

Everything is inside the file: styles, the script, the figures and their data. A content security
policy forbids the page to fetch anything, and only the page's own script may run.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from functools import cache
from importlib.resources import files as resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from isingcut.printing import printable
from isingcut.provenance import __version__
from isingcut.report.baselines import energy_passes
from isingcut.report.blocks import (
    block_ticks,
    couplings_figure,
    dots,
    fields_figure,
    map_rows,
    margin_scale,
    strip,
)
from isingcut.report.figures import healing_figure, scatter_figure, spectrum_figure
from isingcut.report.provenance_rows import provenance_rows, timing_rows
from isingcut.report.run_files import RunFiles
from isingcut.report.score_rows import (
    benchmark_rows,
    comparison_bars,
    healed_rows,
    healing_rows,
    healing_words,
    tiles,
)
from isingcut.report.states import Book, book
from isingcut.report.tradeoff import trade_off_figures
from isingcut.report.words import (
    fidelity_rows,
    listed,
    numbers,
    plus_minus,
    removal_summary,
    spectrum_words,
)


def report_page(files: RunFiles) -> str:
    """The page of one removal of a run."""
    states = book(files)
    n, energy, candidates = len(files.blocks), files.hamiltonian, files.candidates
    rows, scale = map_rows(files, states)
    scatters = []
    if candidates is not None:
        measured = {files.energy: energy, **files.others}
        scatters = [
            scatter_figure(name, measured_energy, files.judged[name]["kl"], states, main=main)
            for name, measured_energy in measured.items()
            if measured_energy is not None and name in files.judged
            for main in [name == files.energy]
        ]
    baselines = states.of("baseline")
    own = next((s for s in states.states if s.chosen and s.kl is not None), None)
    rivals = sorted([*([own] if own else []), *baselines], key=lambda s: s.kl or 0.0)
    rival_scale = margin_scale(files, rivals)
    return page(
        "report.html.j2",
        title=files.title,
        files=files,
        n=n,
        removed=files.removed,
        summary=removal_summary(
            files.removed, n, files.energy, files.meta, candidates, files.healed_candidates
        ),
        tiles=tiles(files),
        bars=[] if files.evaluation is None else comparison_bars(files.evaluation),
        rows=rows,
        scale=scale,
        ticks=block_ticks(n),
        kinds=[str(b.get("kind", "")) for b in files.blocks],
        fields=None if energy is None else fields_figure(energy),
        couplings=None if energy is None else couplings_figure(energy, files.removed),
        fields_rows=[] if energy is None else _field_rows(files),
        spectrum=spectrum_figure(files, states),
        spectrum_words="" if files.spectrum is None else spectrum_words(files.spectrum),
        scatters=scatters,
        fidelity=fidelity_rows(files.judged),
        trade_offs=trade_off_figures(files),
        rivals=[(s, dots(s, rival_scale, energies=False), _rival(files, s)) for s in rivals],
        rival_scale=rival_scale,
        healing=None if files.healing is None else healing_figure(files.healing),
        healing_rows=[] if files.healing is None else healing_rows(files.healing),
        healing_words="" if files.healing is None else healing_words(files.healing),
        healed_rows=healed_rows(files.healed_candidates),
        benchmarks=None if files.benchmarks is None else benchmark_rows(files.benchmarks),
        provenance=provenance_rows(files.run, files.meta),
        timings=timing_rows(files.run, files.folder, files.target),
        config=files.run["config"],
        data=_page_data(files, states),
    )


def _rival(files: RunFiles, state: Any) -> dict[str, Any]:
    """What is said of one method's choice."""
    found = next((b for b in files.baselines if b is state.measured), None)
    if found is None:
        passes = energy_passes(files.meta, len(files.blocks)).replace("not counted", "–")
        return {"name": f"{files.energy}, chosen", "passes": passes, "notes": [], "own": True}
    notes = [*found.get("settings", [])]
    if found.get("merges"):
        notes.append(f"merged into {numbers([group[0] for group in found['merges']])}")
    if found.get("violated"):
        notes.append(f"breaks {', '.join(found['violated'])}")
    return {
        "name": found["baseline"],
        "passes": f"{found['passes']:.3g}",
        "notes": notes,
        "own": False,
    }


def _field_rows(files: RunFiles) -> list[tuple[str, str, str]]:
    energy = files.hamiltonian
    assert energy is not None
    errors = [None] * energy.n if energy.h_error is None else energy.h_error.tolist()
    return [
        (str(i), str(b.get("kind", "")), plus_minus(float(h), e, ".4g"))
        for i, (b, h, e) in enumerate(zip(files.blocks, energy.h, errors, strict=True))
    ]


def _page_data(files: RunFiles, states: Book) -> dict[str, Any]:
    """What the page's script knows: the blocks, the energy's terms and the states."""
    energy = files.hamiltonian
    return {
        "n": len(files.blocks),
        "kinds": [str(b.get("kind", "")) for b in files.blocks],
        "parameters": [b.get("parameters") for b in files.blocks],
        "unit": "" if energy is None else energy.unit,
        "c": None if energy is None else energy.c,
        "h": None if energy is None else _short(energy.h),
        "hError": None if energy is None or energy.h_error is None else _short(energy.h_error, 2),
        "J": None if energy is None else [_short(row) for row in energy.J],
        "JError": None
        if energy is None or energy.J_error is None
        else [_short(row, 2) for row in energy.J_error],
        "states": [
            {
                "name": s.name,
                "removed": list(s.removed),
                "energy": s.energy,
                "kl": s.kl,
                "se": s.kl_se,
                "chosen": s.chosen,
            }
            for s in states.states
        ],
    }


def _short(values: Any, digits: int = 4) -> list[float]:
    return [float(f"{float(v):.{digits}g}") for v in values]


def page(template: str, **values: Any) -> str:
    """A packaged HTML template with its values, styles and script filled in.

    Control characters in the values are spelled out.
    """
    script = _packaged("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = (
        _environment()
        .get_template(template)
        .render(
            **values,
            css=Markup(_packaged("report.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            version=__version__,
        )
    )
    return printable(filled)


@cache
def _packaged(name: str) -> str:
    return resources("isingcut.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isingcut.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    environment.filters["listed"] = listed
    environment.globals["plus_minus"] = plus_minus
    environment.globals["strip"] = strip
    return environment


def code(text: str) -> Markup:
    """Escaped text in which `...` becomes code and, outside it, the sign of a number a minus."""
    parts = str(escape(text)).split("`")
    plain = [re.sub(r"(?<![\w.-])-(?=\d)", "−", p) for p in parts[::2]]
    marked = [f"<code>{p}</code>" for p in parts[1::2]]
    return Markup("".join(a + b for a, b in itertools.zip_longest(plain, marked, fillvalue="")))
