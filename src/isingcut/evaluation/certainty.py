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
    """Log-probability of each right answer, in nats; elsewhere the score.

    That is where answers are written, and where a task of the harness does not say in its usual way
    which of its choices is right.

    Args:
        asked: of each question the harness's task, and what the harness keeps of its answers.
        scores: (n,) of the questions.
        by_length: choices count by their likelihood per character, as they do in ``acc_norm``.
    """
    found, margins = np.array(scores, dtype=np.float64), dict[int, Floats]()
    for i, (task, sample) in enumerate(asked):
        if task.OUTPUT_TYPE == "loglikelihood":
            found[i] = sample["filtered_resps"][0][0]
        elif task.OUTPUT_TYPE == "multiple_choice":
            choices, right = _choices(task, sample["doc"])
            if right:
                likely = np.array([answer[0] for answer in sample["filtered_resps"]])
                margins[i] = _margins(choices, right, likely, by_length=by_length)
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


def _choices(task: Any, question: Any) -> tuple[list[str], list[int]]:
    """The choices of a question, and the places of the right ones; none where that is not said."""
    if not hasattr(task, "multiple_input"):
        # A task in code, which only its own scoring understands.
        return [], []
    choices = list(task.doc_to_choice(question))
    gold = task.doc_to_text(question) if task.multiple_input else task.doc_to_target(question)
    named = gold if isinstance(gold, list) else [gold]
    places = range(len(choices))
    right = [choices.index(g) for g in named if isinstance(g, str) and g in choices]
    return choices, right + [int(g) for g in named if not isinstance(g, str) and g in places]


def _margins(
    choices: Sequence[str], right: Sequence[int], likely: Floats, *, by_length: bool
) -> Floats:
    """How much likelier than the right choice each wrong one is, nats."""
    # Behind them may stand likelihoods without the question, which other scores take.
    likely = likely[: len(choices)]
    if by_length:
        lengths = np.array([max(1, len(choice)) for choice in choices])
        likely = likely * (lengths.mean() / lengths)
    wrong = [i for i in range(len(choices)) if i not in right]
    margins: Floats = likely[wrong] - likely[right].max()
    return margins
