"""Print results as text: tables of spectra, rankings, evaluations and whole runs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from isingcut.console.printing import printable
from isingcut.console.progress import duration
from isingcut.console.rich_console import console
from isingcut.files import evaluations, healings, states
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.report import words
from isingcut.report.rows import (
    CUT_RANKING,
    Row,
    answer_rows,
    benchmark_rows,
    evaluation_rows,
    flip_rows,
    healing_rows,
    kl_of,
    plus_minus,
)
from isingcut.report.run_files import RunFiles

if TYPE_CHECKING:
    from isingcut.models.inspect import Inspection


CUT_ON_RANKING = {"split": "rank", "model": "cut"}
"""Split and model of the losses of a ranking, for `--json`."""


def show_lines(*lines: str) -> None:
    """Print plain lines without wrapping them, so that paths can be copied."""
    for line in lines:
        print(printable(line))


def _show_table(
    title: str,
    headings: Iterable[str],
    rows: Sequence[Sequence[str]],
    left: Iterable[str] = ("",),
    *,
    foot: int = 0,
) -> None:
    """Print a table of figures.

    Args:
        left: headings of the columns with text.
        foot: the number of last rows that a line separates from the others.
    """
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for k, row in enumerate(rows, 1):
        table.add_row(*row, end_section=k == len(rows) - foot)
    console().print(table)


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
    """Print the path of the Hamiltonian, and the next command."""
    # A searched energy is for the given removals; other energies are for any.
    removal = "" if "search" in data["meta"] else " --remove 4 --remove 8"
    show_lines(
        data["hamiltonian"],
        f"next: isingcut solve {shlex.quote(data['folder'])}{removal}",
    )


def show_spectrum(spectrum: Spectrum, remove: str, file: Path) -> None:
    """Print the states of one removal, lowest energy first."""
    status = "proven lowest" if spectrum.proven else "best found, not proven"
    rows = []
    for k, value in enumerate(spectrum.energies):
        blocks = spectrum.removed(k)
        shown = words.state_map(blocks, spectrum.states.shape[1])
        rows.append((str(k), f"{value:.4g}", shown, words.join_blocks(blocks)))
    headings = ("#", f"energy, {spectrum.unit}", "blocks (· removed)", "removed")
    _show_table(
        f"remove {remove}: {len(spectrum)} states, {status}",
        headings,
        rows,
        headings[2:],
    )
    show_lines(f"wrote {file}")


def show_ranking(ranking: states.CandidatesFile) -> None:
    """Print how well the energy ranks, and the chosen state."""
    chosen = ranking.chosen
    lines = []
    for name, judged in {
        "energy": ranking.fidelity,
        **ranking.fidelity_of_others,
    }.items():
        found = words.correlation_text(judged.kl)
        n = f"n = {judged.kl.n}"
        if judged.kl.spearman is None:
            why = n if judged.kl.n else "--random-states 0"
            lines.append(f"{name}: rank correlation {found} ({why})")
        else:
            lines.append(
                f"{name}: Spearman {found}, with the measured KL of {n} states"
            )
    if line := words.sentence("one_pass_words", ranking):
        lines.append(line.replace("`", ""))
    if ranking.by_tasks is not None:
        headings = ("removed", "right", "difference", "log-probability")
        answers = words.table("question_rows", ranking.by_tasks)
        _show_table("choice by questions", headings, answers, headings[:1])
    why = words.sentence("why_words", ranking)
    show_lines(
        *lines,
        f"chosen: blocks {words.join_blocks(chosen.removed)} (state {chosen.position} by energy, "
        f"{why}): KL ({CUT_RANKING}) {kl_of(chosen).text()} nats/token",
    )


def show_baseline(choice: states.BaselineFile, file: Path) -> None:
    """Print the choice of a baseline, its loss and its cost."""
    broken = f"it breaks constraints it does not know: {', '.join(choice.violated)}"
    show_lines(
        f"{choice.baseline}: blocks {words.join_blocks(choice.removed)}: "
        f"KL ({CUT_RANKING}) {kl_of(choice).text()} nats/token; found "
        f"with {choice.passes:.3g} forward passes over {choice.tokens_searched} tokens",
        *([broken] if choice.violated else []),
        f"wrote {file}",
    )


def inspection_data(model: Inspection) -> dict[str, Any]:
    """Return the `--json` content of the verb `inspect`."""
    return {
        "model_type": model.model_type,
        "path": model.stack.path,
        # Index and path come first.
        "blocks": [
            {"index": b.index, "path": b.path, **b.content()}
            for b in model.stack.blocks
        ],
        "rules": model.rules(),
        "refusal": model.refusal,
        "quantisation": model.quantisation,
        "other_bytes": model.other_bytes,
        "placement": model.placement,
    }


def show_inspection(model: Inspection) -> None:
    """Print a model's blocks, their costs and the rules that states obey."""
    header, *rows = model.table()
    where = f"{len(model.stack)} blocks in {model.stack.path}"
    title = f"{model.model_type}: {where}; costs of each, cached as in transformers"
    _show_table(title, header, rows, ["kind"], foot=1)
    if model.quantisation:
        show_lines(f"quantised: {model.quantisation}")
    rules = [f"rule: {rule}" for rule in model.rules()]
    if model.refusal:
        rules = [f"cannot be cut: {model.refusal}"]
    elif len(model.stack) == 1:
        rules.append("its one block stays: none can be removed")
    rules = rules or ["any blocks may be removed, as long as one stays"]
    for device, (first, last) in model.placement.items():
        rules.append(f"blocks {first} to {last}: {device}")
    show_lines(*rules)


def open_finished(target: Path) -> RunFiles:
    """Return the files of a finished run, whose printed commands have its path as typed."""
    files = RunFiles(
        Store.open(target if Store.exists(target) else target.parent), target
    )
    files.called = str(files.folder)
    return files


def run_data(files: RunFiles) -> dict[str, Any]:
    """Return the `--json` content of `run`: the figures of a finished run, and its files."""
    target = files.target
    ranking = files.candidates
    evaluation = files.evaluation
    data: dict[str, Any] = {
        "folder": str(target),
        "checkpoint": files.checkpoint,
        "gguf": files.gguf and str(files.gguf),
        "report": str(target / "report.md"),
        "html": str(target / "report.html"),
        "verdict": files.verdict,
    }
    if files.packing is not None:
        data["packing"] = files.packing.content()
    if ranking is None or evaluation is None:
        # No cut: the whole model meets the budget best.
        return data
    if files.endings:
        data |= answered_data(files.endings.pairs, files.last)
    data |= {
        "chosen": {**ranking.chosen.content(), **CUT_ON_RANKING},
        "fidelity": ranking.fidelity.kl.content(),
        "fidelity_of_others": {
            k: v.kl.content() for k, v in ranking.fidelity_of_others.items()
        },
        "proven": ranking.proven,
        "evaluation": evaluation.content(),
    }
    if (scores := files.benchmarks) is not None:
        data["benchmarks"] = {
            "file": str(target / "benchmarks.json"),
            **scores.content(),
        }
    return data


def answered_data(pairs: Sequence[evaluations.EndingPair], last: str) -> dict[str, Any]:
    """Return the share of answered prompts, for `--json`; nothing without likelihoods."""
    endings = evaluations.Endings.model_construct(pairs=pairs)
    if not endings.rated:
        return {}
    error = endings.error("answered")
    answered = {
        "original": 100 * endings.mean("before", "answered"),
        last: 100 * endings.mean("after", "answered"),
        "change_se": error and 100 * error,
        "n": len(endings.rated),
    }
    return {"answered_percent": answered}


def curve_data(folder: Path) -> list[dict[str, Any]]:
    """Return the chosen state of every ranked removal of a run folder, fewest blocks first."""
    rows = [
        {
            "remove": ranking.remove,
            "removed": ranking.chosen.removed,
            **CUT_ON_RANKING,
            **{k: getattr(ranking.chosen, k) for k in ("kl", "kl_se", "nll", "nll_se")},
            "lowest_kl": min(row.kl for row in ranking.candidates),
            "spearman": ranking.fidelity.kl.spearman,
            "report": str(page)
            if (page := files.target / "report.html").is_file()
            else None,
        }
        for files in RunFiles(Store.open(folder)).removals
        if (ranking := files.candidates) is not None
    ]
    return sorted(rows, key=lambda row: (len(row["removed"]), row["kl"]))


def show_plan(plan: dict[str, Any]) -> None:
    """Print the estimates of the energies and of the later stages, and of a whole run."""
    where = "read from disk block by block" if plan["streamed"] else "in memory"
    limit = "limit of each" if "," in plan["device"] else "limit"
    show_lines(
        f"{plan['model']}: {plan['blocks']} blocks, {decimal(plan['weights'])} as {plan['dtype']}, "
        f"{where} ({limit}: {decimal(plan['allowed'])}) on {plan['device']}",
        f"forward {plan['forward']:.0f} tokens/s, weights from disk {decimal(int(plan['reading']))}"
        f"/s; timed in {duration(plan['probe_seconds'])}; one process",
    )
    for key, name, title in (
        ("energies", "energy", "energies, each with its default number of samples"),
        ("stages", "stage", f"later stages, {plan['remove']} blocks removed"),
    ):
        rows = [
            [
                line["name"],
                str(line["samples"] or ""),
                line["impossible"] or duration(line["seconds"]),
                decimal(line["memory"]),
            ]
            for line in plan[key]
        ]
        _show_table(title, (name, "samples", "time", "memory"), rows, [name])
    show_lines(
        f"times are right within a factor of 2; the checkpoint takes "
        f"{decimal(plan['checkpoint'])} on disk",
        f"on a card a run needs {plan['card_weights']} x weights + {decimal(plan['card_bytes'])} "
        "and CUDA's own memory",
        f"a run with {plan['energy']} takes {duration(plan['seconds'])} in all",
    )


def show_curve(folder: Path) -> None:
    """Print the quality for each number of blocks, and the command that cuts one of the states."""
    names = [f"{name} ({CUT_RANKING})" for name in ("KL, nats/token", "perplexity")]
    chosen = curve_data(folder)
    rows = []
    for row in chosen:
        # Infinite on overflow.
        perplexity = math.exp(row["nll"]) if row["nll"] < 700 else math.inf
        star = " *" * (row["kl"] > row["lowest_kl"])
        figures = (plus_minus(row["kl"], row["kl_se"]) + star, f"{perplexity:.2f}")
        rows.append(
            (str(len(row["removed"])), *figures, words.join_blocks(row["removed"]))
        )
    title = (
        "the chosen states (*: another one has a lower KL as cut; the report says why)"
    )
    _show_table(title, ("removed", *names, "blocks"), rows, ["blocks"])
    show_lines(
        f"cut one: isingcut excise {shlex.quote(str(folder))} --remove "
        f"{chosen[len(chosen) // 2]['remove']}",
        "reports (each shows the whole curve):",
        *(
            f"{row['remove']}: {row['report']}"
            for row in chosen
            if row["report"] is not None
        ),
    )


def show_evaluation(scores: evaluations.EvaluationFile) -> None:
    """Print the before/after table, without the NLL (the report has it)."""
    title = f"unseen text: {scores.tokens} tokens in {scores.samples} samples"
    rows = evaluation_rows(scores)
    _show_rows(title, [row for row in rows if row.key != "nll"], "change")


def show_healing(healing: healings.HealingFile, folder: Path) -> None:
    """Print the quality before and after healing, on unseen text."""
    title = (
        f"unseen text: {healing.report_tokens} tokens; trained on {healing.tokens_seen} tokens "
        f"in {len(healing.steps)} steps"
    )
    rows = [row for row in healing_rows(healing) if row.key != "nll"]
    _show_rows(title, rows, "change" if any(row.change for row in rows) else "")
    show_lines(f"wrote {folder}", words.sentence("healing_verdict", healing))


def show_benchmarks(scores: evaluations.BenchmarksFile, file: Path, last: str) -> None:
    """Print the scores of both models, and whether each difference is more than noise."""
    title = "benchmarks, the same questions for both models"
    if scores.left_out:
        title += f", without the {scores.left_out} used to choose the blocks"
    _show_rows(title, benchmark_rows(scores, last=last), "difference (95 %)")
    headings, *rows = flip_rows(scores)
    if rows:
        _show_table("answers that changed (95 %)", headings, rows, headings[:1])
    if scores.endings:
        endings = evaluations.Endings(pairs=scores.endings)
        _show_rows("generated answers", answer_rows(endings, last), "change")
    show_lines(f"wrote {file}")


def _show_rows(title: str, rows: Sequence[Row], change: str) -> None:
    """Print a table with a row per quantity, a column per model, and a column of changes."""
    models = list(rows[0].values) if rows else []
    noted = any(row.notes for row in rows)
    cells = [
        [
            row.name,
            *(row.text(model) for model in models),
            *[row.change] * bool(change),
            *[", ".join(row.notes)] * noted,
        ]
        for row in rows
        if any(row.values.values())
    ]
    _show_table(title, ["", *models, *[change] * bool(change), *[""] * noted], cells)


def show_run(files: RunFiles, *, generation: bool = False) -> None:
    """Print the results of a finished run; with ``generation`` also one text before and after."""
    page = files.target / "report.html"
    if files.packing is not None:
        headings, *rows = words.table("packing_rows", files)
        _show_table(
            f"types for {files.packing.budget}", headings, rows, ("type", headings[3])
        )
    if files.candidates is None or files.evaluation is None:
        show_lines(
            f"report:     {page} (and report.md)", files.verdict.replace("`", "")
        )
        return
    show_ranking(files.candidates)
    show_evaluation(files.evaluation)
    if files.benchmarks is not None:
        file = files.target / "benchmarks.json"
        show_benchmarks(files.benchmarks, file, files.last)
    answers = files.evaluation.answers
    lines = [f"checkpoint: {files.product}", f"report:     {page} (and report.md)"]
    if files.gguf:
        lines.insert(1, f"GGUF:       {files.gguf}")
    if generation and answers is not None:
        first = answers.ordered[0]
        if answers.shown is None:
            lines.append("no prompt is answered as the original could; the first one:")
        lines += [f"prompt:   {first.prompt}", f"original: {first.before.text}"]
        lines.append(f"{files.last + ':':9} {first.after.text}")
    show_lines(*lines, files.verdict.replace("`", ""))
