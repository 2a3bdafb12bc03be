"""Print results as text: tables of spectra, rankings, evaluations and whole runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from isingcut.console.printing import printable
from isingcut.console.progress import duration
from isingcut.console.rich_console import console
from isingcut.files.documents import (
    BaselineFile,
    BenchmarksFile,
    CandidatesFile,
    Correlations,
    EvaluationFile,
    HealingFile,
)
from isingcut.files.writing import read_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.report.rows import (
    RANKING,
    Row,
    benchmark_rows,
    evaluation_rows,
    healing_rows,
    kl_of,
    labelled,
    plus_minus,
)
from isingcut.report.run_files import RunFiles
from isingcut.report.words import (
    correlation_text,
    listed,
    one_pass_words,
    question_rows,
    state_map,
)
from isingcut.runs.folder import MANIFEST

if TYPE_CHECKING:
    from isingcut.models.inspect import Inspection


def show_lines(lines: list[str]) -> None:
    """Print plain lines without wrapping them, so that paths can be copied."""
    for line in lines:
        print(printable(line))


def energy_data(folder: Path) -> dict[str, Any]:
    """Return the `--json` content of the verb `energy`."""
    file = folder / "hamiltonian.safetensors"
    hamiltonian = Hamiltonian.load(file)
    return {
        "folder": str(folder),
        "hamiltonian": str(file),
        "blocks": hamiltonian.n,
        "unit": hamiltonian.unit,
        "meta": dict(hamiltonian.meta),
    }


def show_energy(data: dict[str, Any]) -> None:
    """Print where the Hamiltonian is, and the next command."""
    # A search was for one removal; other energies serve any.
    removal = "" if "search" in data["meta"] else " --remove 4 --remove 8"
    show_lines([data["hamiltonian"], f"next: isingcut solve {data['folder']}{removal}"])


def show_spectrum(spectrum: Spectrum, remove: str, file: Path) -> None:
    """Print the states of one removal, lowest energy first."""
    status = "proven lowest" if spectrum.proven else "best found, not proven"
    table = Table(title=f"remove {remove}: {len(spectrum)} states, {status}", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column(f"energy, {spectrum.unit}", justify="right")
    table.add_column("blocks (· removed)")
    table.add_column("removed")
    n = spectrum.states.shape[1]
    for k, value in enumerate(spectrum.energies):
        blocks = spectrum.removed(k)
        table.add_row(str(k), f"{value:.4g}", state_map(blocks, n), listed(blocks))
    screen = console()
    screen.print(table)
    screen.print(f"wrote {file}", soft_wrap=True)


def show_ranking(found: CandidatesFile) -> None:
    """Print how well the energy ranks, and the chosen state."""
    screen = console()
    chosen = found.chosen
    for name, judged in {"energy": found.fidelity, **found.fidelity_of_others}.items():
        screen.print(fidelity_line(name, judged.kl), soft_wrap=True)
    if said := one_pass_words(found):
        screen.print(said.replace("`", ""), soft_wrap=True)
    if found.by_tasks is not None:
        for blocks, *figures in question_rows(found.by_tasks):
            names = ("questions", "right", "difference", "log-probability", "p")
            shown = [f"{name} {x}" for name, x in zip(names, figures, strict=True) if x]
            screen.print(f"without {blocks}: {', '.join(shown)}", soft_wrap=True)
    screen.print(
        f"chosen: blocks {listed(chosen.removed)} (state {chosen.position} by energy, "
        f"{chosen.why}): {labelled('KL', 'cut', RANKING)} {kl_of(chosen).text()} nats/token",
        soft_wrap=True,
    )


def fidelity_line(name: str, figures: Correlations) -> str:
    """Return one line on how well an energy ranks measured losses."""
    if not figures.n:
        return f"{name}: rank correlation not measured (--random-states 0)"
    if figures.spearman is None:
        return f"{name}: rank correlation undefined (n = {figures.n})"
    return (
        f"{name}: Spearman {correlation_text(figures, 'spearman')}, "
        f"Kendall {figures.kendall:.2f}, with the measured KL of n = {figures.n} states"
    )


def show_baseline(found: BaselineFile, file: Path) -> None:
    """What a baseline chose, what that is worth and what it cost."""
    screen = console()
    screen.print(
        f"{found.baseline}: blocks {listed(found.removed)}: {labelled('KL', 'cut', RANKING)} "
        f"{kl_of(found).text()} nats/token; found "
        f"with {found.passes:.3g} forward passes over {found.tokens_searched} tokens",
        soft_wrap=True,
    )
    if found.violated:
        words = f"it breaks constraints it does not know: {', '.join(found.violated)}"
        screen.print(words, soft_wrap=True)
    screen.print(f"wrote {file}", soft_wrap=True)


def inspection_data(found: Inspection) -> dict[str, Any]:
    """What `inspect --json` prints."""
    return {
        "model_type": found.model_type,
        "path": found.stack.path,
        "blocks": [dataclasses.asdict(b) for b in found.stack.blocks],
        "rules": found.rules(),
        "refusal": found.refusal,
        "quantisation": found.quantisation,
        "other_bytes": found.other_bytes,
    }


def show_inspection(found: Inspection) -> None:
    """A model's blocks, their costs and the rules that states obey."""
    header, *rows = found.table()
    title = f"{found.model_type}: {len(found.stack)} blocks in {found.stack.path}; costs of each"
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    screen = console()
    screen.print(table)
    if found.quantisation:
        screen.print(f"quantised: {found.quantisation}", soft_wrap=True)
    if found.refusal:
        screen.print(f"cannot be cut: {found.refusal}", soft_wrap=True)
        return
    for rule in found.rules():
        screen.print(f"rule: {rule}", soft_wrap=True)
    if len(found.stack) == 1:
        screen.print("its one block stays: none can be removed", soft_wrap=True)
    elif not found.rules():
        screen.print("any blocks may be removed, as long as one stays", soft_wrap=True)


def finished(target: Path) -> RunFiles:
    """The files of a run that is finished, read once for all that is said of it."""
    return RunFiles(target if (target / MANIFEST).is_file() else target.parent, target)


def run_data(files: RunFiles) -> dict[str, Any]:
    """What `run --json` prints of a finished run: the figures of its files, and where they are."""
    target, ranking, evaluation = files.target, files.candidates, files.evaluation
    assert ranking is not None
    assert evaluation is not None
    return {
        "folder": str(target),
        "checkpoint": str(files.product),
        "report": str(target / "report.md"),
        "html": str(target / "report.html"),
        "verdict": files.verdict,
        "chosen": {**ranking.chosen.content(), "split": "rank", "model": "cut"},
        "fidelity": ranking.fidelity.kl.content(),
        "fidelity_of_others": {k: v.kl.content() for k, v in ranking.fidelity_of_others.items()},
        "proven": ranking.proven,
        "evaluation": evaluation.content(),
    }


def curve_data(folder: Path) -> list[dict[str, Any]]:
    """The chosen state of every removal that was ranked in a run folder, fewest blocks first."""
    files = folder.glob("remove-*/candidates.json")
    found = [(f, read_document(f, CandidatesFile)) for f in files]
    rows = [
        {
            "remove": r.remove,
            "removed": r.chosen.removed,
            "split": "rank",
            "model": "cut",
            **{k: getattr(r.chosen, k) for k in ("kl", "kl_se", "nll", "nll_se")},
            "spearman": r.fidelity.kl.spearman,
            "report": str(page) if (page := file.with_name("report.html")).is_file() else None,
        }
        for file, r in found
    ]
    return sorted(rows, key=lambda row: (len(row["removed"]), row["kl"]))


def show_plan(plan: dict[str, Any]) -> None:
    """Print the estimates of the energies and of the later stages, and the recommended command."""
    screen = console()
    where = "read from disk block by block" if plan["streamed"] else "in memory"
    probe, trust = f"timed in {duration(plan['probe_seconds'])}", "are right within a factor of 2"
    if plan["card"]:
        probe = "from the card's data sheet"
        trust = "assume 40 % of the card's peak FLOP/s; nothing was timed"
    screen.print(
        f"{plan['model']}: {plan['blocks']} blocks, {decimal(plan['weights'])} as {plan['dtype']}, "
        f"{where} (limit: {decimal(plan['allowed'])}) on {plan['device']}\n"
        f"forward {plan['forward']:.0f} tokens/s, weights from disk {decimal(int(plan['reading']))}"
        f"/s; {probe}; one process",
        soft_wrap=True,
    )
    for key, name, title in (
        ("energies", "energy", "energies, each with its default number of samples"),
        ("stages", "stage", f"later stages, {plan['remove']} blocks removed"),
    ):
        table = Table(name, title=title, title_justify="left")
        for column in ("samples", "time", "memory"):
            table.add_column(column, justify="right")
        for e in plan[key]:
            figures = [e["impossible"] or duration(e["seconds"]), decimal(e["memory"])]
            table.add_row(e["name"], str(e["samples"] or ""), *figures)
        screen.print(table)
    screen.print(
        f"times {trust}; the checkpoint has {decimal(plan['checkpoint'])}\n"
        f"recommended: {plan['recommended']}, {duration(plan['seconds'])} in all: {plan['why']}\n"
        f"{plan['command']}",
        soft_wrap=True,
    )


def show_curve(folder: Path) -> None:
    """Print the quality for each number of blocks, and the command that cuts one of the states."""
    table = Table(title="the best state of each size, on the ranking text")
    names = [labelled(name, "cut", RANKING) for name in ("KL, nats/token", "perplexity")]
    for heading in ("removed", *names, "blocks"):
        table.add_column(heading, justify="left" if heading == "blocks" else "right")
    rows = curve_data(folder)
    for row in rows:
        table.add_row(
            str(len(row["removed"])),
            plus_minus(row["kl"], row["kl_se"]),
            f"{perplexity(row['nll']):.2f}",
            listed(row["removed"]),
        )
    screen = console()
    screen.print(table)
    screen.print(
        f"cut one: isingcut excise {folder} --remove {rows[len(rows) // 2]['remove']}",
        soft_wrap=True,
    )
    screen.print("reports (each shows the whole curve):")
    for row in rows:
        if row["report"] is not None:
            screen.print(f"{row['remove']}: {row['report']}", soft_wrap=True)


def perplexity(nll: float) -> float:
    """Convert a loss in nats per token to a perplexity; infinite on overflow."""
    return math.exp(nll) if nll < 700 else math.inf


def show_evaluation(found: EvaluationFile, *, last: str = "cut") -> None:
    """Print the before/after table, without the NLL (the report has it)."""
    title = f"unseen text: {found.tokens} tokens in {found.samples} samples"
    rows = evaluation_rows(found, last=last)
    _show_rows(title, [row for row in rows if row.key != "nll"], "change")


def show_healing(found: HealingFile, folder: Path) -> None:
    """Print the quality before and after healing, on unseen text."""
    title = (
        f"unseen text: {found.report_tokens} tokens; trained on {found.tokens_seen} tokens "
        f"in {len(found.steps)} steps"
    )
    _show_rows(title, [row for row in healing_rows(found) if row.key != "nll"])
    console().print(f"wrote {folder}", soft_wrap=True)


def show_benchmarks(found: BenchmarksFile, file: Path, *, last: str = "cut") -> None:
    """Print the scores of both models, and whether each difference is more than noise."""
    title = "benchmarks, the same questions for both models"
    if found.left_out:
        title += f", without the {found.left_out} used to choose the blocks"
    _show_rows(title, benchmark_rows(found, last=last), "difference (95 %)")
    console().print(f"wrote {file}", soft_wrap=True)


def _show_rows(title: str, rows: Sequence[Row], change: str = "") -> None:
    """Print a table with a row per quantity, a column per model, and a column of changes."""
    table = Table(title=title, title_justify="left")
    models = list(rows[0].values) if rows else []
    noted = any(row.notes for row in rows)
    table.add_column("")
    for name in (*models, *([change] if change else [])):
        table.add_column(name, justify="right")
    if noted:
        table.add_column("")
    for row in rows:
        if not any(row.values.values()):
            continue
        cells = [row.name, *(row.text(model) for model in models)]
        cells += [row.change] * bool(change) + [", ".join(row.notes)] * noted
        table.add_row(*cells)
    console().print(table)


def show_run(files: RunFiles, *, generation: bool = False) -> None:
    """Print the results of a finished run; with ``generation`` also one text before and after."""
    screen = console()
    assert files.candidates is not None
    assert files.evaluation is not None
    show_ranking(files.candidates)
    show_evaluation(files.evaluation, last=files.last)
    screen.print(f"checkpoint: {files.product}", soft_wrap=True)
    page = files.target / "report.html"
    screen.print(f"report:     {page} (and report.md)", soft_wrap=True)
    if generation and (texts := files.evaluation.generation) is not None:
        screen.print(f"prompt:   {texts.prompt}", soft_wrap=True)
        screen.print(f"original: {texts.before}", soft_wrap=True)
        screen.print(f"{files.last + ':':9} {texts.after}", soft_wrap=True)
    screen.print(files.verdict.replace("`", ""), soft_wrap=True)
