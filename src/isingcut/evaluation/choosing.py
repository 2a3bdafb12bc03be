"""Choose among a few candidates by questions, asked until one of them is ahead.

All that are still in answer the same questions, first `FIRST` of them and `GROWTH` times as many at
each further look. What counts is the log-probability that a candidate gives the right answers,
which says more than how many of them are its likeliest (docs/experiments.md). At every look,
whoever falls short of the leader with a paired p-value (by the bootstrap over questions) below

    alpha / (L K (K - 1) / 2)

is out: L looks and K candidates at the start, Bonferroni's correction over all looks and all pairs.
So, however often one looks and whoever leads, the chance is about alpha at most that a candidate is
dropped which is as good as the leader of that moment. Of those that are left in the end the one of
lowest loss is chosen that falls short of the leader by no more than a standard error: the best of
several by a few questions is mostly the luckiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from isingcut.errors import InputError
from isingcut.evaluation.paired import p_value
from isingcut.evaluation.scores import Scores
from isingcut.files.documents import AskedCandidate, ByTasks, MeasuredState
from isingcut.ising.states import Floats, swaps

FIRST, GROWTH = 50, 1.5
"""Questions at the first look, and the factor from one look to the next."""
ALPHA = 0.05
"""Chance of dropping a candidate wrongly, over all looks and pairs."""
CONTENDERS = 5
"""Candidates that are asked."""
_APART = 2
"""Blocks that two of them differ in, as long as there are such: near copies answer alike."""


Ask = Callable[[Sequence[Sequence[int]], str, Sequence[str]], Sequence[Scores]]
"""What each candidate (its removed blocks) makes of a task's questions, in any order that is the
same for all candidates."""


@dataclass(eq=False)
class _Contender:
    removed: Sequence[int]
    scores: dict[str, list[float]] = field(default_factory=dict)
    certainties: dict[str, list[float]] = field(default_factory=dict)
    out: bool = False

    def add(self, task: str, scores: Scores) -> None:
        self.scores.setdefault(task, []).extend(scores.values.tolist())
        self.certainties.setdefault(task, []).extend(scores.certainties.tolist())

    @property
    def asked(self) -> int:
        return sum(map(len, self.scores.values()))

    def right(self) -> Floats:
        """(n,) scores, task after task."""
        return np.array([score for scores in self.scores.values() for score in scores])


def looks(total: int) -> list[int]:
    """Numbers of questions asked at each look, ascending; the last is all of them."""
    ends, size = [], float(FIRST)
    while size < total:
        ends.append(round(size))
        size *= GROWTH
    return [*ends, total]


def draw_half(keys: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Half of the questions of each task, drawn by ``seed``; the other half is for a report.

    Raises:
        InputError: a task has a single question.
    """
    found = {}
    for number, (task, all_keys) in enumerate(keys.items()):
        distinct = list(dict.fromkeys(all_keys))
        if len(distinct) < 2:
            raise InputError(f"{task} has one question; to choose by it takes two or more")
        order = np.random.default_rng([seed, 0xA5, number]).permutation(len(distinct))
        found[task] = [distinct[i] for i in order[: len(distinct) // 2]]
    return found


def contenders(rows: Sequence[MeasuredState], also: Sequence[int] = ()) -> list[int]:
    """Positions of the candidates that are asked, lowest loss first.

    The one of lowest loss, and by loss those that differ in two blocks or more from all of lower
    loss that are asked; where these are too few, the next by loss.

    Args:
        also: the blocks of a candidate that is asked whatever its loss.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].kl)
    found = [i for i in order if i == order[0] or sorted(rows[i].removed) == sorted(also)]
    for apart in (_APART, 1):
        for i in order:
            far = all(swaps(rows[i].removed, rows[j].removed) >= apart for j in found)
            if far and len(found) < CONTENDERS:
                found.append(i)
    return sorted(found, key=order.index)


def choose_by_questions(
    candidates: Sequence[Sequence[int]], questions: Mapping[str, Sequence[str]], ask: Ask
) -> tuple[int, ByTasks]:
    """The candidate of lowest loss among those that answer as well as the best.

    Tasks take turns, so that they count alike until the shortest is through.

    Args:
        candidates: removed blocks of each, lowest loss first.
        questions: keys by task, in the order they are asked.
        ask: scores candidates, all that are left at once.

    Returns:
        its position in ``candidates``, and how it was chosen; differences are of accuracies, on
        the questions that a candidate and the chosen one both answered.
    """
    turns = [
        (task, key)
        for row in zip_longest(*([(t, k) for k in keys] for t, keys in questions.items()))
        for task, key in filter(None, row)
    ]
    ends = looks(len(turns))
    pairs = len(candidates) * (len(candidates) - 1) / 2
    bound = ALPHA / (len(ends) * max(1.0, pairs))
    all_of_them = [_Contender(removed) for removed in candidates]
    left, done, looked = all_of_them, 0, 0
    while len(left) > 1 and looked < len(ends):
        batch: dict[str, list[str]] = {}
        for task, key in turns[done : ends[looked]]:
            batch.setdefault(task, []).append(key)
        for task, keys in batch.items():
            for contender, answered in zip(
                left, ask([c.removed for c in left], task, keys), strict=True
            ):
                contender.add(task, answered)
        done, looked = ends[looked], looked + 1
        merits = _merits(left)
        leader = int(np.argmax(merits.mean(1)))
        for other, own in zip(left, merits, strict=True):
            behind = bool(own.mean() < merits[leader].mean())
            other.out = behind and p_value(own, merits[leader]) < bound
        left = [c for c in left if not c.out]
    best = _lowest_of_the_best(left) if done else left[0]
    asked = [key for _, key in turns[:done]]
    tasks = [task for task, _ in turns[:done]]
    return all_of_them.index(best), ByTasks(
        ahead=len(left) == 1,
        alpha=ALPHA,
        looks=looked,
        looks_planned=len(ends),
        by_task={task: tasks.count(task) for task in questions},
        asked=list(dict.fromkeys(asked)),
        candidates=[_row(c, best) for c in all_of_them],
        tasks=list(questions),
    )


def _merits(several: Sequence[_Contender]) -> Floats:
    """(K, n) certainties on the questions that all have answered, task after task.

    Each task's are divided by how much candidates and questions spread about what a question's mean
    is: nats of a long answer would outvote those of a letter.
    """
    parts = []
    for task in several[0].certainties:
        shared = min(len(c.certainties.get(task, ())) for c in several)
        if not shared:
            # Whoever was dropped early may not have come to it.
            continue
        values = np.array([c.certainties[task][:shared] for c in several])
        spread = float((values - values.mean(0)).std())
        parts.append(values / (spread or 1.0))
    return np.concatenate(parts, axis=1)


def _lowest_of_the_best(left: Sequence[_Contender]) -> _Contender:
    """The first that falls short of the leader by at most a standard error, paired."""
    merits = _merits(left)
    behind = merits[int(np.argmax(merits.mean(1)))] - merits
    n = merits.shape[1]
    error = behind.std(1, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(len(left))
    return left[int(np.argmax(behind.mean(1) <= error))]


def _row(contender: _Contender, best: _Contender) -> AskedCandidate:
    asked = contender.asked
    certain = [c for values in contender.certainties.values() for c in values]
    mean, error, p = None, None, None
    if contender is not best and asked:
        own, others = (
            np.concatenate([c.scores[t][: len(mine)] for t, mine in contender.scores.items()])
            for c in (contender, best)
        )
        difference = own - others
        mean = float(difference.mean())
        error = float(difference.std(ddof=1) / math.sqrt(asked)) if asked > 1 else None
        p = p_value(*_merits([best, contender]))
    return AskedCandidate(
        removed=list(contender.removed),
        questions=asked,
        accuracy=float(contender.right().mean()) if asked else None,
        certainty=float(np.mean(certain)) if asked else None,
        dropped=contender.out,
        difference=mean,
        difference_se=error,
        p_value=p,
    )
