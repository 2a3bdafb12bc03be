"""Compare both models on benchmark tasks, and choose among candidates by their questions.

tasks by name -> scores of both models -> paired comparison, task by task

Results are kept in a journal until a task is complete.

To choose, all candidates are scored on the same questions. The score is the log-probability of the
right answers, which is more precise than accuracy (docs/experiments.md). Of the candidates within
one standard error of the best one, the one of lowest loss is chosen, because a lead of a few
questions is mostly chance.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.console.progress import Part, silent
from isingcut.errors import InputError
from isingcut.evaluation.answers import rate_answers
from isingcut.evaluation.failures import note_failure
from isingcut.evaluation.questions import Prepared
from isingcut.evaluation.scores import Scores, score_states
from isingcut.files.evaluations import EndingPair, Flips, PairedScores, Percent, TaskRow
from isingcut.files.results import fingerprint, without_infinities
from isingcut.files.states import ByTasks, ScoredCandidate
from isingcut.formats.sources import model_identity
from isingcut.ising.states import Bools, Floats
from isingcut.measure.losses import standard_error
from isingcut.measure.work import PLAIN, Work
from isingcut.models.load import LoadedModel


def benchmark(
    models: Mapping[str, LoadedModel],
    tasks: Sequence[Prepared],
    work: Work = PLAIN,
    *,
    but: Collection[str] = (),
    kept: Path | None = None,
) -> tuple[list[TaskRow], dict[str, str]]:
    """Score two models on tasks, and compare them.

    Args:
        models: two models by name; rows call them ``original`` and ``cut``.
        work: batch size and progress display.
        but: keys (`question_key`) of questions to leave out.
        kept: folder for journals, for resuming.

    Returns:
        the rows of `benchmarks.json`; and by task the reason why it has none, such as that it has
        no score per question.
    """
    first, _ = models.values()
    left_out = frozenset(but)
    rows = []
    failed = dict[str, str]()
    with work.progress("benchmarks", 2 * len(tasks)) as bar:
        for task in tasks:
            pair = []
            depends = [task.limit, *sorted(left_out)]
            with note_failure(task.name, failed):
                for name, model in models.items():
                    journal = kept and journal_of(kept, task, model, depends)
                    part = Part(bar, 1)
                    own = replace(work, progress=part, journal=journal)
                    (scores,) = score_states(
                        model, task, [()], own, wanted=lambda key: key not in left_out
                    )
                    part.finish(f"{task.name}, {name}: {scores.values.mean():.3f}")
                    pair.append(scores)
                endings = list[EndingPair]()
                if pair[0].written:
                    rated = kept and kept / f"{task.name}-likelihoods.journal"
                    own = replace(work, journal=rated, progress=silent)
                    prompts, before = zip(*pair[0].written, strict=True)
                    after = [answer for _, answer in pair[1].written]
                    endings = rate_answers(first.replay, prompts, before, after, own)
                rows.append(row(pair[0], pair[1], endings))
    return rows, failed


def row(original: Scores, cut: Scores, endings: Sequence[EndingPair] = ()) -> TaskRow:
    """Make one row of `benchmarks.json` from the scores of two models on the same questions.

    Args:
        endings: how their generated answers ended, question by question.
    """
    assert original.questions == cut.questions
    assert original.metric == cut.metric
    compared = compare_scores(original.values, cut.values)
    return TaskRow(
        task=original.task,
        questions_sha=fingerprint(original.questions),
        metric=original.metric.removesuffix(",none"),
        shots=original.shots,
        flips=count_flips(original, cut) if compared.test == "mcnemar" else None,
        endings=[*endings],
        **dict(compared),
    )


def journal_of(kept: Path, task: Prepared, loaded: LoadedModel, depends: Any) -> Path:
    """Return the path of the journal of one model on one task.

    Args:
        kept: the folder of journals.
        depends: everything else that the scores depend on, JSON-able.
    """
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), depends])
    return kept / f"{task.name}-{identity}.journal"


RESAMPLES = 10_000


def compare_scores(first: Floats, second: Floats) -> PairedScores:
    """Compare the scores (n,) of two models on the same n questions.

    Right-or-wrong scores use McNemar's exact test; others use the centred bootstrap distribution of
    the mean difference. The 95 % interval of second - first is by the paired bootstrap over
    questions.
    """
    n = len(first)
    means = (float(first.mean()), float(second.mean()))
    difference = second - first
    resampled = _resample(difference)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    right_or_wrong = np.isin(np.concatenate([first, second]), (0.0, 1.0)).all()
    if right_or_wrong:
        p = mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
    else:
        mean = difference.mean()
        p = float((1 + (np.abs(resampled - mean) >= abs(mean)).sum()) / (1 + RESAMPLES))
        # Resamples of a few questions vary too little; the sign test has no p-value below this.
        p = max(p, 2.0 ** (1 - n))
    errors = [
        float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else None for x in (first, second)
    ]
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
        test="mcnemar" if right_or_wrong else "bootstrap",
        more_than_noise=p < 0.05,
    )


def count_flips(original: Scores, cut: Scores) -> Flips:
    """Compare the answers of two models, each right or wrong, to the same questions.

    Shares have Wilson's 95 % interval, the kept score that of the paired bootstrap over questions.
    Chance is 1 / choices, and 0 for questions without choices.

    Source: Dutta et al. 2024, "Accuracy is Not All You Need" (arXiv 2407.09141).
    """
    pairs = zip(original.answers, cut.answers, strict=True)
    change = cut.values - original.values
    chance = np.array([1 / len(own) if len(own) else 0.0 for own in original.choices])
    logs = [
        [own - np.logaddexp.reduce(own) for own in each.choices if len(own)]
        for each in (original, cut)
    ]
    kls = [np.exp(p) @ (p - q) for p, q in zip(*logs, strict=True)]
    return Flips(
        changed=_share(np.array([before != after for before, after in pairs])),
        right_to_wrong=_share(change < 0),
        wrong_to_right=_share(change > 0),
        kept=_kept(original.values - chance, cut.values - chance),
        choice_kl=float(np.mean(kls)) if kls else None,
    )


def _share(hits: Bools) -> Percent:
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    low, high = (100 * float(end) for end in interval)
    return Percent(percent=100 * float(hits.mean()), low=low, high=high)


def _kept(first: Floats, second: Floats) -> Percent | None:
    """Return the mean of the second in percent of the first's, which must be above 0."""
    if round(float(first.mean()), 9) <= 0:
        return None
    # Both resample the same questions.
    whole, left = (_resample(each).round(9) for each in (first, second))
    ratios = left / np.where(whole > 0, whole, 1.0)
    # A resample without a score above chance counts as lowest, and as highest.
    tail = RESAMPLES // 40
    low, high = (
        without_infinities(float(100 * np.sort(np.where(whole > 0, ratios, no))[end]))
        for no, end in ((-math.inf, tail), (math.inf, -1 - tail))
    )
    return Percent(
        percent=100 * float(second.mean() / first.mean()), low=low, high=high
    )


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


CONTENDERS = 5
"""Number of candidates to compare, besides the one without the last blocks."""


def draw_half(keys: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Draw half of the questions of each task by ``seed``; the other half is for reports.

    Raises:
        InputError: a task has a single question.
    """
    halves = {}
    for number, (task, all_keys) in enumerate(keys.items()):
        distinct = list(dict.fromkeys(all_keys))
        if len(distinct) < 2:
            raise InputError(
                f"{task} has one question; --choose tasks needs two or more per task"
            )
        order = np.random.default_rng([seed, 0xA5, number]).permutation(len(distinct))
        halves[task] = [distinct[i] for i in order[: len(distinct) // 2]]
    return halves


def choose_by_questions(
    candidates: Sequence[Sequence[int]],
    questions: Mapping[str, Sequence[str]],
    scores: Sequence[Sequence[Scores]],
) -> tuple[int, ByTasks]:
    """Choose the candidate of lowest loss among those that score as well as the best.

    That is within one paired standard error of the highest mean certainty. The certainties of each
    task are divided by their spread around the means of its questions, because long answers have
    more nats than single letters.

    Args:
        candidates: removed blocks of each of the K candidates, lowest loss first.
        questions: keys by task.
        scores: of each task, those of all candidates.

    Returns:
        the index in ``candidates``, and the record of the choice.
    """
    right = np.concatenate([[one.values for one in each] for each in scores], axis=1)
    certain = [np.array([one.certainties for one in each]) for each in scores]
    spreads = [float((values - values.mean(0)).std()) for values in certain]
    merits = np.concatenate(
        [v / (s or 1.0) for v, s in zip(certain, spreads, strict=True)], axis=1
    )
    behind = merits[int(merits.mean(1).argmax())] - merits
    each = np.ones(merits.shape[1], dtype=np.int64)
    # The error of a single question is NaN, and the first candidate is chosen.
    best = int(np.argmax(behind.mean(1) <= standard_error(behind, each)))
    differences = right - right[best]
    errors = standard_error(differences, each).tolist()
    rows = [
        ScoredCandidate(
            removed=list(removed),
            accuracy=float(right[k].mean()),
            certainty=float(np.concatenate(certain, axis=1)[k].mean()),
            difference=None if k == best else float(differences[k].mean()),
            difference_se=None if k == best else without_infinities(errors[k]),
        )
        for k, removed in enumerate(candidates)
    ]
    return best, ByTasks(
        tasks=list(questions),
        by_task={task: len(keys) for task, keys in questions.items()},
        questions=[key for keys in questions.values() for key in keys],
        candidates=rows,
    )
