"""`report.html`: one page per run that needs nothing but itself.

Everything is inside the file: styles, the script, the figures and their data. A content security
policy forbids the page to fetch anything, and only the page's own script may run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report.baselines import rivals
from isingcut.report.blocks import (
    block_ticks,
    couplings_figure,
    dots,
    fields_figure,
    map_rows,
    margin_scale,
)
from isingcut.report.choice import question_rows, questions_words
from isingcut.report.fidelity import fidelity_rows, measured_words
from isingcut.report.figures import healing_figure, scatter_figure, spectrum_figure
from isingcut.report.provenance_rows import provenance_rows, timing_rows
from isingcut.report.render import render_page
from isingcut.report.rows import (
    Difference,
    Row,
    benchmark_rows,
    healing_rows,
    healing_start,
    patch_rows,
    plus_minus,
)
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book, book, measured_kl
from isingcut.report.svg import Scale, whisker
from isingcut.report.tradeoff import AXES, trade_off_figure
from isingcut.report.words import healing_words, listed, patch_story, patch_words, spectrum_words


def report_page(files: RunFiles) -> str:
    """The page of one removal of a run."""
    states = book(files)
    n, energy = len(files.blocks), files.hamiltonian
    rows, scale = map_rows(files, states)
    energies = {files.energy: energy, **files.others}
    scatters = [
        scatter_figure(name, measured, found["kl"], states, main=name == files.energy)
        for name, found in files.judged.items()
        if (measured := energies.get(name)) is not None
    ]
    others = rivals(files, states)
    rival_scale = margin_scale(files, [rival.state for rival in others])
    asked = (files.candidates or {}).get("by_tasks")
    return render_page(
        "report.html.j2",
        title=files.title,
        files=files,
        n=n,
        removed=files.removed,
        tiles=_tiles(files),
        meter=_meter,
        models=list(files.scores[0].values) if files.scores else [],
        patch=files.patch,
        patch_story=patch_story(files.patch) if files.patch else "",
        patch_rows=patch_rows(files.patch),
        patch_words="" if files.evaluation is None else patch_words(files.evaluation),
        rows=rows,
        scale=scale,
        ticks=block_ticks(n),
        kinds=[str(b.get("kind", "")) for b in files.blocks],
        fields=None if energy is None else fields_figure(energy),
        couplings=None if energy is None else couplings_figure(energy, files.removed),
        fields_rows=[] if energy is None else _field_rows(files.blocks, energy),
        spectrum=spectrum_figure(files, states),
        spectrum_words="" if files.spectrum is None else spectrum_words(files.spectrum),
        scatters=scatters,
        measured_words="" if files.candidates is None else measured_words(files.candidates),
        fidelity=fidelity_rows(files.judged),
        asked=asked and (questions_words(asked), question_rows(asked)),
        trade_offs=[trade_off_figure(files, axis) for axis in AXES],
        rivals=[(rival, dots(rival.state, rival_scale, energies=False)) for rival in others],
        rival_scale=rival_scale,
        healing=None if files.healing is None else healing_figure(files.healing),
        healing_rows=[] if files.healing is None else healing_rows(files.healing),
        healing_start="" if files.healing is None else healing_start(files.healing),
        healing_words="" if files.healing is None else healing_words(files.healing),
        healed_rows=_healed_rows(files.healed_candidates),
        benchmarks=[]
        if files.benchmarks is None
        else benchmark_rows(files.benchmarks, last=files.last),
        provenance=provenance_rows(files),
        timings=timing_rows(files.run, files.folder, files.target),
        config=files.run["config"],
        data=_page_data(files, states),
    )


def _tiles(files: RunFiles) -> list[tuple[str, str, str]]:
    """The headline figures: what, how much, and from what to what."""
    found = {row.key: row for row in files.scores}

    def tile(key: str, name: str, after: str) -> list[tuple[str, str, str]]:
        row = found.get(key)
        return [] if row is None or not row.change else [(name, row.change, f"{row.way}{after}")]

    result = tile("parameters", "parameters", " million")
    known = [b.get("kv_bytes_per_token") for b in files.blocks]
    cache = [float(c) for c in known if c is not None]
    whole = sum(cache)
    if files.removed is not None and len(cache) == len(known) and whole:
        kept = whole - sum(cache[i] for i in files.removed)
        words = f"{whole / 1e3:.1f} → {kept / 1e3:.1f} kB per token"
        result.append(("KV cache", str(Difference(100 * (kept / whole - 1), percent=True)), words))
    result += tile("decode_tokens_per_second", "decode speed", " tokens/s, measured")
    result += tile("perplexity", "perplexity", ", unseen text")
    kl = found["kl"].values[found["kl"].last] if found else None
    if kl is not None:
        error = "" if kl.error is None else f", ± {kl.error:.3f}"
        result.append(("KL", f"{kl.figure:.3f}", f"nats/token to the original{error}"))
    return result


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


def _healed_rows(found: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Candidates compared after some healing: blocks, where from, KL before and after, the rest.

    The rest: steps made, paired difference to the chosen one, and what became of it.
    """
    if found is None:
        return []
    return [
        (
            listed(row["removed"]),
            row.get("source", "spectrum"),
            f"{row['kl_before']:.4f}",
            measured_kl(row).text(),
            str(row.get("steps") or ""),
            ""
            if row.get("difference") is None
            else plus_minus(row["difference"], row["difference_se"]),
            "chosen"
            if row["removed"] == found["chosen"]["removed"]
            else "dropped"
            if row.get("dropped")
            else "",
        )
        for row in sorted(found["candidates"], key=lambda r: float(r["kl"]))
    ]


def _field_rows(
    blocks: Sequence[Mapping[str, Any]], energy: Hamiltonian
) -> list[tuple[str, str, str]]:
    errors = [None] * energy.n if energy.h_error is None else energy.h_error.tolist()
    return [
        (str(i), str(b.get("kind", "")), plus_minus(float(h), e, ".4g"))
        for i, (b, h, e) in enumerate(zip(blocks, energy.h, errors, strict=True))
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
                "kl": None if s.kl is None else s.kl.figure,
                "se": None if s.kl is None else s.kl.error,
                "chosen": s.chosen,
            }
            for s in states
        ],
    }


def _short(values: Any, digits: int = 4) -> list[float]:
    return [float(f"{float(v):.{digits}g}") for v in values]
