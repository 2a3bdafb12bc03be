"""What a run says of its choice: which questions decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isingcut.report.rows import plus_minus
from isingcut.report.words import listed


def chosen_by_tasks(found: Mapping[str, Any]) -> str:
    """Why a candidate was chosen by questions.

    Args:
        found: ``by_tasks`` of `candidates.json`.
    """
    rows, asked = found["candidates"], sum(found["by_task"].values())
    if len(rows) == 1 or not asked:
        return "the only candidate, no question was asked"
    lead = "ahead of all others" if found["ahead"] else "its lead is within the noise"
    return f"best of {len(rows)} on {asked} questions of {', '.join(found['tasks'])}; {lead}"


def questions_words(found: Mapping[str, Any]) -> str:
    """How a choice by questions was made, and that none of them judges the final model."""
    share = ", ".join(f"{n} of {task}" for task, n in found["by_task"].items())
    return (
        f"The {len(found['candidates'])} candidates of lowest KL, as exact cuts, were asked the "
        f"same questions ({share}), in {found['looks']} of at most {found['looks_planned']} "
        "batches. Whoever fell short of the leader by McNemar's test was dropped, at a level of "
        f"{100 * found['alpha']:.0f} % over all batches and pairs. Benchmarks of the final model "
        "leave these questions out."
    )


def question_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each candidate: blocks removed, questions, share right, difference to the chosen, p."""
    return [
        (
            listed(row["removed"]),
            str(row["questions"]),
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            "chosen"
            if row["difference"] is None
            else plus_minus(row["difference"], row["difference_se"])
            + (", dropped" if row["dropped"] else ""),
            "" if row["p_value"] is None else f"{row['p_value']:.2g}",
        )
        for row in found["candidates"]
    ]
