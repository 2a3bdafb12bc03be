"""What the command line prints of evaluations, of healing and of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from isingcut.console.rich_console import console
from isingcut.files.documents import BenchmarksFile, EvaluationFile, HealingFile
from isingcut.report.rows import Row, benchmark_rows, evaluation_rows, healing_rows


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
