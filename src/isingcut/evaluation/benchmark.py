"""Compare both models on benchmark tasks, and choose among candidates by their questions.

tasks by name -> scores of both models -> paired comparison, task by task

Results are kept in a journal until a task is complete.

To choose, all remaining candidates are scored on the same questions, first on `FIRST` and then on
`GROWTH` times as many at each look. The score is the log-probability of the right answers, which is
more precise than accuracy (docs/experiments.md). At each look, a candidate is dropped if it is
worse than the best one with a paired p-value (by the bootstrap over questions) below

    alpha / (L K (K - 1) / 2)

with L looks and K candidates at the start: Bonferroni's correction over all looks and all pairs. So
the probability of dropping a candidate as good as the best one is at most about alpha. Among the
remaining candidates within one standard error of the best one, the one of lowest loss is chosen,
because a lead of a few questions is mostly chance.
"""

from __future__ import annotations

import contextlib
import glob
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.console.progress import Part
from isingcut.data.calibration import pack
from isingcut.data.tokens import Encoder, TokenSet
from isingcut.errors import InputError
from isingcut.evaluation.quality import quality
from isingcut.evaluation.questions import Prepared, articles, short_name
from isingcut.evaluation.scores import Scores, score_states
from isingcut.files.evaluations import PairedScores, TaskRow, TextScores
from isingcut.files.results import fingerprint
from isingcut.files.states import ByTasks, MeasuredState, ScoredCandidate
from isingcut.ising.states import Floats, swaps
from isingcut.measure.work import PLAIN, Work
from isingcut.models.architectures.blocks import text_config
from isingcut.models.sources import model_identity

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel


def benchmark(
    models: Mapping[str, LoadedModel],
    tasks: Sequence[Prepared],
    work: Work = PLAIN,
    *,
    but: Collection[str] = (),
    kept: Path | None = None,
) -> list[TaskRow]:
    """Score two models on tasks, and return the rows of `benchmarks.json` that compare them.

    Args:
        models: two models by name; rows call them ``original`` and ``cut``.
        work: batch size and progress display.
        but: keys (`question_key`) of questions to leave out.
        kept: folder for journals, for resuming.

    Raises:
        InputError: a task has no score per question.
    """
    assert len(models) == 2
    left_out = frozenset(but)
    wanted = (lambda key: key not in left_out) if left_out else None
    rows = []
    with work.progress("benchmarks", 2 * len(tasks)) as bar:
        for task in tasks:
            pair = []
            for name, model in models.items():
                depends = [task.limit, *sorted(left_out)]
                journal = None if kept is None else journal_of(kept, task, model, depends)
                part = Part(bar, 1)
                own = replace(work, progress=part, journal=journal)
                (found,) = score_states(model, task, [()], own, wanted=wanted)
                part.finish(f"{task.name}, {name}: {found.values.mean():.3f}")
                pair.append(found)
            rows.append(row(*pair))
    return rows


def row(original: Scores, cut: Scores) -> TaskRow:
    """Make one row of `benchmarks.json` from the scores of two models on the same questions."""
    assert original.questions == cut.questions
    assert original.metric == cut.metric
    found = compare_scores(original.values, cut.values)
    metric = original.metric.removesuffix(",none")
    return TaskRow(task=original.task, metric=metric, shots=original.shots, **dict(found))


def journal_of(kept: Path, task: Prepared, loaded: LoadedModel, depends: Any) -> Path:
    """Return the path of the journal of one model on one task.

    Args:
        kept: the folder of journals.
        depends: everything else that the scores depend on, JSON-able.
    """
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), depends])
    return kept / f"{task.name}-{identity}.journal"


def forget_scores(kept: Path, tasks: Sequence[str]) -> None:
    """Delete the journals of tasks in a folder, and the folder if it is empty then."""
    for name in map(short_name, tasks):
        for path in kept.glob(f"{glob.escape(name)}-*.journal"):
            path.unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()


def text_scores(
    models: Mapping[str, LoadedModel],
    data: Path | None,
    samples: int | None,
    work: Work = PLAIN,
    *,
    length: int = 1024,
) -> TextScores:
    """Measure the perplexity of both models on WikiText-2's raw test text, and compare them.

    The articles are joined and split into independent windows of ``length`` tokens; the last, short
    window is left out.

    Args:
        data: folder with `wikitext2/test_raw.jsonl`, one article per line.
        samples: maximum number of windows.

    Raises:
        InputError: as `articles`, or the text is shorter than one window.
    """
    assert data is not None
    original, cut = models.values()
    longest = getattr(text_config(original.model), "max_position_embeddings", None)
    size = min(length, int(longest or length))
    encode = Encoder(original.tokenizer, original.model)
    rows = list(islice(pack([encode("\n".join(articles(data)))], encode, size), samples))
    if not rows:
        raise InputError(f"WikiText-2's text is shorter than one window of {size} tokens")
    windows = TokenSet.from_rows(rows)
    found = quality(original.model, cut.model, windows, work)
    return TextScores(
        samples=windows.samples,
        tokens=windows.tokens,
        original=found.before,
        cut=found.after,
        kl=found.kl,
        kl_se=found.kl_se,
        nll_change_se=found.nll_change_se,
    )


RESAMPLES = 10_000


def compare_scores(first: Floats, second: Floats) -> PairedScores:
    """Compare the scores (n,) of two models on the same n questions.

    Right-or-wrong scores use McNemar's exact test; others use the centred bootstrap distribution of
    the mean difference. The 95 % interval of second - first is by the paired bootstrap over
    questions.
    """
    n, means = len(first), (float(first.mean()), float(second.mean()))
    resampled = _resample(second - first)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    p = p_value(first, second, resampled)
    errors = [float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else None for x in (first, second)]
    return PairedScores(
        original=means[0],
        original_se=errors[0],
        cut=means[1],
        cut_se=errors[1],
        difference=means[1] - means[0],
        difference_low=low,
        difference_high=high,
        n=n,
        p_value=p,
        test="mcnemar" if right_or_wrong(first, second) else "bootstrap",
        more_than_noise=p < 0.05,
    )


def p_value(first: Floats, second: Floats, resampled: Floats | None = None) -> float:
    """Return the two-sided p-value of no difference between two models' scores (n,).

    Args:
        resampled: resampled means of the difference, if computed already.
    """
    difference = second - first
    if right_or_wrong(first, second):
        return mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
    if resampled is None:
        resampled = _resample(difference)
    mean = difference.mean()
    p = (1 + (np.abs(resampled - mean) >= abs(mean)).sum()) / (1 + len(resampled))
    # Resamples of a few questions vary too little; the sign test has no p-value below this.
    return max(float(p), 2.0 ** (1 - len(difference)))


def right_or_wrong(*scores: Floats) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.isin(np.concatenate(scores), (0.0, 1.0)).all())


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        lost: number of questions that only the first model has right.
        won: number of questions that only the second has right.

    Source: McNemar 1947; exact binomial form, sum of both tails.
    """
    from scipy.stats import binomtest

    if lost + won == 0:
        return 1.0
    return float(binomtest(won, lost + won, 0.5).pvalue)


def _resample(values: Floats) -> Floats:
    """Return the means of resamples with replacement, computed a few million numbers at a time."""
    rng = np.random.default_rng(0)
    rows = max(1, 4_000_000 // len(values))
    parts = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        parts.append(values[rng.integers(0, len(values), (count, len(values)))].mean(1))
    return np.concatenate(parts)


FIRST, GROWTH = 50, 1.5
"""Questions at the first look, and the factor from one look to the next."""
ALPHA = 0.05
"""Probability of wrongly dropping a candidate, over all looks and pairs."""
CONTENDERS = 5
"""Number of candidates to compare."""
_APART = 2
"""Minimum number of blocks in which two of them differ, if possible: near copies score the same."""


Ask = Callable[[Sequence[Sequence[int]], str, Sequence[str]], Sequence[Scores]]
"""Function that scores candidates (removed blocks) on a task's questions, in one order for all."""


@dataclass(eq=False)
class _Contender:
    """A candidate; scores and certainties are in question order and end when it is dropped."""

    removed: Sequence[int]
    scores: list[float] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    out: bool = False


def looks(total: int) -> list[int]:
    """Return the number of questions at each look, ascending; the last is all questions."""
    ends, size = [], float(FIRST)
    while round(size) < total:
        ends.append(round(size))
        size *= GROWTH
    return [*ends, total]


def draw_half(keys: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Draw half of the questions of each task by ``seed``; the other half is for reports.

    Raises:
        InputError: a task has a single question.
    """
    found = {}
    for number, (task, all_keys) in enumerate(keys.items()):
        distinct = list(dict.fromkeys(all_keys))
        if len(distinct) < 2:
            raise InputError(f"{task} has one question; --choose tasks needs two or more per task")
        order = np.random.default_rng([seed, 0xA5, number]).permutation(len(distinct))
        found[task] = [distinct[i] for i in order[: len(distinct) // 2]]
    return found


def contenders(rows: Sequence[MeasuredState], also: Sequence[int] = ()) -> list[int]:
    """Select the candidates to compare, lowest loss first; return their indices.

    Takes the one of lowest loss, then by loss those that differ in two blocks or more from all
    selected ones; if these are too few, the next by loss.

    Args:
        also: removed blocks of a candidate that is always included.
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
    """Choose the candidate of lowest loss among those that score as well as the best.

    Questions alternate between tasks, so that tasks have equal weight until the shortest ends.

    Args:
        candidates: removed blocks of each candidate, lowest loss first.
        questions: keys by task, in order.
        ask: scores all remaining candidates at once.

    Returns:
        the index in ``candidates``, and the record of the choice. Its differences are of
        accuracies, on the questions that both the candidate and the chosen one were scored on.
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
    left, done, looked, tasks = all_of_them, 0, 0, list[str]()
    while len(left) > 1 and looked < len(ends):
        batch: dict[str, list[str]] = {}
        for task, key in turns[done : ends[looked]]:
            batch.setdefault(task, []).append(key)
        for task, keys in batch.items():
            for contender, answered in zip(
                left, ask([c.removed for c in left], task, keys), strict=True
            ):
                contender.scores += answered.values.tolist()
                contender.certainties += answered.certainties.tolist()
            tasks += [task] * len(answered.values)
        done, looked = ends[looked], looked + 1
        merits = _merits(left, tasks)
        leader = int(np.argmax(merits.mean(1)))
        for other, own in zip(left, merits, strict=True):
            behind = bool(own.mean() < merits[leader].mean())
            other.out = behind and p_value(own, merits[leader]) < bound
        left = [c for c in left if not c.out]
    best = left[0]
    if done:
        # The first within one paired standard error of the best.
        merits = _merits(left, tasks)
        behind = merits[int(np.argmax(merits.mean(1)))] - merits
        n = merits.shape[1]
        error = behind.std(1, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(len(left))
        best = left[int(np.argmax(behind.mean(1) <= error))]
    used = turns[:done]
    return all_of_them.index(best), ByTasks(
        ahead=len(left) == 1,
        alpha=ALPHA,
        looks=looked,
        looks_planned=len(ends),
        by_task={task: sum(t == task for t, _ in used) for task in questions},
        questions=list(dict.fromkeys(key for _, key in used)),
        candidates=[_row(c, best, tasks) for c in all_of_them],
        tasks=list(questions),
    )


def _places(tasks: Sequence[str]) -> list[list[int]]:
    """Return the indices of each distinct task in a list of tasks."""
    return [[i for i, t in enumerate(tasks) if t == task] for task in dict.fromkeys(tasks)]


def _merits(several: Sequence[_Contender], tasks: Sequence[str]) -> Floats:
    """Return (K, n) certainties on the questions that all candidates were scored on, by task.

    The values of each task are divided by their spread around the means of its questions, because
    long answers have more nats than single letters.
    """
    shared = min(len(c.scores) for c in several)
    parts = []
    for places in _places(tasks[:shared]):
        values = np.array([c.certainties[:shared] for c in several])[:, places]
        spread = float((values - values.mean(0)).std())
        parts.append(values / (spread or 1.0))
    return np.concatenate(parts, axis=1)


def _row(contender: _Contender, best: _Contender, tasks: Sequence[str]) -> ScoredCandidate:
    count = len(contender.scores)
    places = [i for task in _places(tasks[:count]) for i in task]
    right, certain = (np.array(v)[places] for v in (contender.scores, contender.certainties))
    mean, error, p = None, None, None
    if contender is not best and count:
        difference = right - np.array(best.scores)[places]
        mean = float(difference.mean())
        error = float(difference.std(ddof=1) / math.sqrt(count)) if count > 1 else None
        p = p_value(*_merits([best, contender], tasks))
    return ScoredCandidate(
        removed=list(contender.removed),
        questions=count,
        accuracy=float(right.mean()) if count else None,
        certainty=float(certain.mean()) if count else None,
        dropped=contender.out,
        difference=mean,
        difference_se=error,
        p_value=p,
    )
