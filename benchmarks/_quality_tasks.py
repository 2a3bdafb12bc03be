"""Zero-shot accuracy of many states on multiple-choice tasks and LAMBADA, as a run asks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _merging import Merged
from _parts_command import TASK_TOKENS, bits
from _quality_bench import Bench
from _quality_judge import Chosen
from _quality_store import Part, Price
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score_states
from isingcut.files.writing import fingerprint

TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada")


def accuracy_parts(bench: Bench, chosen: dict[str, Chosen]) -> list[Part]:
    """One part a task, for what has not been scored there yet."""
    parts = []
    for task in bench.options.tasks:
        seen = {
            row["key"]
            for _, part in bench.store.under(f"accuracy/{task}")
            for row in part["states"]
        }
        fresh = [chosen[key] for key in sorted(chosen) if key not in seen]
        if fresh:
            parts.append(_part(bench, task, fresh))
    return parts


METHODS = 12
"""Distinct states expected from all methods at one number of removals."""


def accuracy_expected(bench: Bench, known: int) -> list[Price]:
    """The price of scoring the states that are still to be chosen."""
    left = METHODS * len(bench.options.accuracy_remove) + 1 - known
    if left <= 0:
        return []
    tokens = sum(TASK_TOKENS[task] for task in bench.options.tasks) * bench.options.questions
    return [Price(tokens, 0.45 * left, 0.1 * left)]


def _part(bench: Bench, task: str, chosen: list[Chosen]) -> Part:
    states = [c for c in chosen if c.merges is None]
    merged = [c for c in chosen if c.merges is not None]

    def make(journal: Path) -> dict[str, Any]:
        prepared = prepare_task(task, bench.data, bench.options.questions)
        model = Asked(bench.loaded, bench.replay)

        def ask(group: list[Chosen], path: Path) -> list[dict[str, Any]]:
            found = score_states(model, prepared, [c.removed for c in group], bench.work(path))
            return [
                {"key": c.key, s.metric.removesuffix(",none"): bits(s.values)}
                for c, s in zip(group, found, strict=True)
            ]

        graded = ask(states, journal) if states else []
        for k, c in enumerate(merged):
            with Merged(bench.replay, c.merges):
                graded += ask([c], journal.with_name(f"{journal.name}-{k}"))
        return {"task": task, "questions": bench.options.questions, "states": graded}

    tokens = TASK_TOKENS[task] * bench.options.questions
    passes = sum(bench.n - len(c.removed) for c in states) / bench.n * 0.6 + len(merged)
    name = f"accuracy/{task}/{fingerprint([c.key for c in chosen])}"
    return Part(name, make, (Price(tokens, passes, 0.1 * len(chosen)),))
