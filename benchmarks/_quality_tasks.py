"""Zero-shot accuracy of many states on multiple-choice tasks and LAMBADA, prefixes shared.

The conventions are those of lm-evaluation-harness. A choice is scored by the log-likelihood of
its tokens given the context; `acc` takes the highest sum, `acc_norm` the highest sum over the
number of characters of the choice. WinoGrande is scored by partial evaluation: the sentence
after the blank, given the sentence up to it with each name filled in. LAMBADA is right where
greedy decoding gives the last word. Context and continuation are tokenised together and cut
where the context's own tokens end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from _merging import Merged
from _quality_bench import Bench
from _quality_judge import Chosen
from _quality_store import Part, Price
from isingcut.data.encoder import Encoder
from isingcut.evaluation.likelihoods import Row, answer_scores
from isingcut.files.writing import fingerprint
from isingcut.ising.states import Floats, states_of

FILES = {
    "arc_easy": "arc_easy/test_sub500.jsonl",
    "hellaswag": "hellaswag/val_sub500.jsonl",
    "piqa": "piqa/val_sub500.jsonl",
    "winogrande": "winogrande/dev_sub500.jsonl",
    "lambada": "lambada/test_sub500.jsonl",
}
METRIC = {"hellaswag": "acc_norm"}
"""What is usually reported for a task, where that is not `acc`."""


@dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, and which continuation is right."""

    pairs: tuple[tuple[str, str], ...]
    answer: int
    lengths: tuple[int, ...]


def questions(task: str, records: Sequence[dict[str, Any]]) -> list[Question]:
    """The questions of a task in the form the harness has them."""
    found = []
    for r in records:
        if task == "lambada":
            context, _, word = r["text"].rpartition(" ")
            found.append(Question(((context, f" {word}"),), 0, (1,)))
            continue
        choices = [str(c) for c in r["choices"]]
        if task == "winogrande":
            before, _, after = r["context"].partition("_")
            pairs = [(before + c, f" {after.strip()}") for c in choices]
        elif task == "hellaswag":
            pairs = [(r["context"], f" {c}") for c in choices]
        else:
            pairs = [(f"Question: {r['context']}\nAnswer:", f" {c}") for c in choices]
        lengths = tuple(max(1, len(c)) for c in choices)
        found.append(Question(tuple(pairs), int(r["answer"]), lengths))
    return found


def encoded(tokenizer: Any, context: str, continuation: str) -> Row:
    """Token ids of both together, and how many of them are the continuation's."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    start = Encoder(tokenizer).start
    whole = start + ids(context + continuation)
    held = len(start) + len(ids(context))
    # A tokenizer may merge the last of the context with the first of the continuation.
    return tuple(whole), max(1, len(whole) - held)


def grade(
    items: Sequence[Question], scores: Floats, greedy: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Right or wrong by question, under `acc` and, for multiple choice, `acc_norm`.

    Args:
        scores, greedy: (R,) over the pairs of all questions in order.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    at = 0
    for q in items:
        part = scores[at : at + len(q.pairs)]
        if len(q.pairs) == 1:
            right["acc"].append(bool(greedy[at]))
        else:
            right["acc"].append(int(np.argmax(part)) == q.answer)
            right["acc_norm"].append(int(np.argmax(part / np.array(q.lengths))) == q.answer)
        at += len(q.pairs)
    return {name: np.array(values) for name, values in right.items() if values}


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
    tokens = sum(sum(len(ids) for ids, _ in _rows(bench, task)[1]) for task in bench.options.tasks)
    return [Price(tokens, 0.45 * left, 0.1 * left)]


def _rows(bench: Bench, task: str) -> tuple[list[Question], list[Row]]:
    """The questions of a task and the token rows of all their pairs."""
    path = bench.data / FILES[task]
    lines = path.read_text(encoding="utf-8").splitlines()[: bench.options.questions]
    items = questions(task, [json.loads(line) for line in lines])
    tokenizer = bench.loaded.tokenizer
    return items, [encoded(tokenizer, c, k) for q in items for c, k in q.pairs]


def _part(bench: Bench, task: str, chosen: list[Chosen]) -> Part:
    items, rows = _rows(bench, task)
    states = [c for c in chosen if c.merges is None]
    merged = [c for c in chosen if c.merges is not None]

    def make(journal: Path) -> dict[str, Any]:
        def score(group: list[Chosen], path: Path) -> list[dict[str, Any]]:
            removed = states_of(bench.n, [c.removed for c in group])
            words = f"{task}: {len(group)} models"
            found = answer_scores(bench.replay, rows, removed, bench.work(path), words)
            return [_graded(items, c.key, *one) for c, *one in zip(group, *found, strict=True)]

        graded = score(states, journal) if states else []
        for k, c in enumerate(merged):
            with Merged(bench.replay, c.merges):
                graded += score([c], journal.with_name(f"{journal.name}-{k}"))
        return {"task": task, "questions": len(items), "states": graded}

    tokens = sum(len(ids) for ids, _ in rows)
    passes = sum(bench.n - len(c.removed) for c in states) / bench.n * 0.6 + len(merged)
    heads = len(chosen) * sum(k for _, k in rows) / tokens
    name = f"accuracy/{task}/{fingerprint([c.key for c in chosen])}"
    return Part(name, make, (Price(tokens, passes, heads),))


def _graded(
    items: Sequence[Question], key: str, scores: Floats, greedy: npt.NDArray[np.bool_]
) -> dict[str, str]:
    right = grade(items, scores, greedy)
    return {"key": key, **{name: _bits(values) for name, values in right.items()}}


def _bits(right: npt.NDArray[np.bool_]) -> str:
    return "".join("1" if r else "0" for r in right)
