"""What the command line prints of evaluations, of healing and of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from isingcut.console.rich_console import console
from isingcut.files.documents.scores import BenchmarksFile, EvaluationFile, HealingFile
from isingcut.report.rows import Row, benchmark_rows, evaluation_rows, healing_rows, plus_minus
from isingcut.report.words import overlap_warnings, patch_warnings


def healing_warnings(found: HealingFile) -> list[str]:
    """What a healing did not do, from its `healing.json`."""
    warnings, asked = [], found.options.length
    if asked is not None and found.length is not None and asked > found.length:
        warnings.append(
            f"samples have {found.length} tokens instead of --length {asked}: the model has as "
            "many positions"
        )
    warnings += [*patch_warnings(found), *overlap_warnings(found.overlap)]
    if found.stopped is not None:
        warnings.append(found.stopped.why)
    if found.patch is not None and not found.patch.changed:
        layers = ", ".join(f"block {c.block}'s {c.layer}" for c in found.patch.cuts)
        warnings.append(
            f"the linear patch changed nothing ({layers}): on text held out no map was better than "
            "none, or it vanished in the weights' rounding; give more --patch-tokens, or distil"
        )
    for name, after in found.after.parts.items():
        before = found.before.parts[name]
        if after.kl > before.kl:
            figures = [
                f"{plus_minus(side.kl, side.kl_se)} (perplexity {side.perplexity:.2f})"
                for side in (before, after)
            ]
            warnings.append(
                f"on {name} the model got worse: KL {figures[0]} before, {figures[1]} after; give "
                "that text more weight, or heal less"
            )
    return warnings


def show_evaluation(found: EvaluationFile, *, last: str = "cut") -> None:
    """The before/after table; NLL, which says what perplexity says, is in the report."""
    title = f"unseen text: {found.tokens} tokens in {found.samples} samples"
    rows = evaluation_rows(found, last=last)
    _show_rows(title, [row for row in rows if row.key != "nll"], "change")


def show_healing(found: HealingFile, folder: Path) -> None:
    """Quality before and after, on text held out."""
    title = (
        f"text held out: {found.report_tokens} tokens; trained on {found.tokens_seen} predictions "
        f"in {len(found.steps)} steps"
    )
    _show_rows(title, [row for row in healing_rows(found) if row.key != "nll"])
    console().print(f"wrote {folder}", soft_wrap=True)


def show_benchmarks(found: BenchmarksFile, file: Path, *, last: str = "cut") -> None:
    """Scores of both models, and whether each difference is more than noise."""
    title = "benchmarks, the same questions for both"
    if found.left_out:
        title += f", without the {found.left_out} that chose the blocks"
    _show_rows(title, benchmark_rows(found, last=last), "difference (95 %)")
    console().print(f"wrote {file}", soft_wrap=True)


def _show_rows(title: str, rows: Sequence[Row], change: str = "") -> None:
    """One line a quantity, one column a model, and what changed where that has a name."""
    table = Table(title=title, title_justify="left")
    models = list(rows[0].values) if rows else []
    noted = any(row.notes for row in rows)
    table.add_column("")
    for name in (*models, *([change] if change else [])):
        table.add_column(name, justify="right")
    if noted:
        table.add_column("")
    for row in rows:
        cells = [row.name, *(row.text(model) for model in models)]
        cells += [row.change] * bool(change) + [", ".join(row.notes)] * noted
        table.add_row(*cells)
    console().print(table)
