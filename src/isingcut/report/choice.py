"""What a run says of its choice: what it won over one pass, which questions decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isingcut.report.rows import plus_minus
from isingcut.report.words import MUCH_WORSE, listed


def one_pass_words(candidates: Mapping[str, Any]) -> str:
    """What the search has won over what one pass of the original gives; empty without a search."""
    found, chosen = candidates.get("one_pass"), candidates["chosen"]
    if not found:
        return ""
    best = min(found["states"], key=lambda row: float(row["kl"]))
    name, blocks = best["method"], listed(best["removed"])
    many = f" for {found['searched_for']} removals" if found["searched_for"] > 1 else ""
    once = "1 pass" if round(found["passes"], 2) == 1 else f"{found['passes']:.2g} passes"
    price = f"{found['search_passes']:.3g} passes over its text{many}"
    if sorted(best["removed"]) == sorted(chosen["removed"]):
        return (
            f"The search ended where one pass ends: {price} found nothing better than the state "
            f"that `{name}` gives after {once}."
        )
    said = (
        f"The best state of one pass (`{name}`, without {blocks}; {once}) "
        f"has KL {plus_minus(best['kl'], best['kl_se'])} nats per token, the chosen one "
        f"{plus_minus(chosen['kl'], chosen['kl_se'])}"
    )
    won = best["kl"] - chosen["kl"]
    if won > 0:
        return f"{said}: {price} have won {won:.3g}, {won / best['kl']:.0%} of it."
    return f"{said}: the choice was not made by KL."


def chosen_by_tasks(found: Mapping[str, Any], kl: float, lowest: float) -> str:
    """Why a candidate was chosen by questions, and whether its loss says otherwise.

    Args:
        found: ``by_tasks`` of `candidates.json`.
        kl, lowest: its KL, and the lowest of all candidates, nats per token.
    """
    rows, asked = found["candidates"], sum(found["by_task"].values())
    if len(rows) == 1 or not asked:
        return "the only candidate, no question was asked"
    place = "ahead" if found["ahead"] else "lowest KL within a standard error of the best"
    best = f"{place} of {len(rows)} on {asked} questions of {', '.join(found['tasks'])}"
    if kl <= MUCH_WORSE * lowest:
        return best
    return f"{best}; its KL is {kl:.3g}, the lowest {lowest:.3g}: heal what is to write"


def questions_words(found: Mapping[str, Any]) -> str:
    """How a choice by questions was made, and that none of them judges the final model."""
    share = ", ".join(f"{n} of {task}" for task, n in found["by_task"].items())
    return (
        f"{len(found['candidates'])} candidates (the lowest KL, the next ones that are no near "
        "copies, the one without the last blocks where it is allowed), as exact cuts, were asked "
        f"the same questions ({share}), in {found['looks']} of at most {found['looks_planned']} "
        "batches. What counts is the log-probability of the right answers, which tells more than "
        "how many are right. Whoever fell short of the leader by a paired test was dropped, at a "
        f"level of {100 * found['alpha']:.0f} % over all batches and pairs; of the others the one "
        "of lowest KL is chosen that is within a standard error of the leader. Benchmarks of the "
        "final model leave these questions out."
    )


def question_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each candidate: blocks removed, questions, share right, its difference to the chosen
    one's, log-probability of the right answers in nats, p of the test by it."""
    return [
        (
            listed(row["removed"]),
            str(row["questions"]),
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            "chosen"
            if row["difference"] is None
            else plus_minus(row["difference"], row["difference_se"])
            + (", dropped" if row["dropped"] else ""),
            "" if row.get("certainty") is None else f"{row['certainty']:.3f}",
            "" if row["p_value"] is None else f"{row['p_value']:.2g}",
        )
        for row in found["candidates"]
    ]
