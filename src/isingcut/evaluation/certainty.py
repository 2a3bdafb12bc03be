"""How sure a model is of right answers: what tells two models apart by fewer questions than scores.

Whether the right choice is the likeliest says yes or no; its log-probability says how nearly. It
ranks cut models on questions that are held out better than their scores do (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isingcut.ising.states import Floats

_TEMPERATURES = np.exp(np.linspace(-2.0, 4.0, 61))


def certainties(
    asked: Sequence[tuple[Any, dict[str, Any]]], scores: Floats, *, by_length: bool
) -> Floats:
    """Log-probability of each right answer, in nats; the score where an answer is written.

    Args:
        asked: of each question the harness's task, and what the harness keeps of its answers.
        scores: (n,) of the questions.
        by_length: choices count by their likelihood per character, as they do in ``acc_norm``.
    """
    found, margins = np.array(scores, dtype=np.float64), dict[int, Floats]()
    for i, (task, sample) in enumerate(asked):
        answers = [float(answer[0]) for answer in _likelihoods(task, sample)]
        if task.OUTPUT_TYPE == "loglikelihood":
            found[i] = answers[0]
        elif task.OUTPUT_TYPE == "multiple_choice":
            margins[i] = _margins(task, sample["doc"], np.array(answers), by_length=by_length)
    if margins:
        found[list(margins)] = tempered(list(margins.values()))
    return found


def tempered(margins: Sequence[Floats]) -> Floats:
    """(n,) log-probabilities of right choices at the one temperature that makes them highest.

    Args:
        margins: of each question, by how many nats each wrong choice is likelier than the right
            one.
    """
    size = max(map(len, margins))
    padded = np.array([np.pad(m, (0, size - len(m)), constant_values=-np.inf) for m in margins])
    # Beside the right choice, whose own margin is 0.
    logits = np.concatenate([np.zeros((len(padded), 1)), padded], axis=1)
    each = [-np.logaddexp.reduce(logits / t, axis=1) for t in _TEMPERATURES]
    best: Floats = max(each, key=lambda values: float(values.mean()))
    return best


def _likelihoods(task: Any, sample: dict[str, Any]) -> Sequence[Any]:
    return [] if task.OUTPUT_TYPE == "generate_until" else list(sample["filtered_resps"])


def _margins(task: Any, question: Any, likely: Floats, *, by_length: bool) -> Floats:
    """How much likelier than the right choice each wrong one is, nats."""
    choices = task.doc_to_choice(question)
    gold = task.doc_to_text(question) if task.multiple_input else task.doc_to_target(question)
    named = gold if isinstance(gold, list) else [gold]
    right = [choices.index(g) if isinstance(g, str) else int(g) for g in named]
    # Behind them may stand likelihoods without the question, which other scores take.
    likely = likely[: len(choices)]
    if by_length:
        lengths = np.array([max(1, len(choice)) for choice in choices])
        likely = likely * (lengths.mean() / lengths)
    wrong = [i for i in range(len(choices)) if i not in right]
    margins: Floats = likely[wrong] - likely[right].max()
    return margins
