"""Two models on the same questions: how large is the difference, and is it more than noise?"""

from __future__ import annotations

import math

import numpy as np

from isingcut.files.documents import PairedScores
from isingcut.ising.states import Floats

RESAMPLES = 10_000


def compare_scores(first: Floats, second: Floats, seed: int = 0) -> PairedScores:
    """Compare the scores (n,) of two models on the same n questions.

    Right-or-wrong scores get McNemar's exact test (questions that both have right, or both wrong,
    say nothing); others the bootstrap distribution of the mean difference, centred. The interval of
    second - first is of 95 %, by the paired bootstrap over questions.
    """
    n, means = len(first), (float(first.mean()), float(second.mean()))
    resampled = _resampled(second - first, seed)
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


def p_value(first: Floats, second: Floats, resampled: Floats | None = None, seed: int = 0) -> float:
    """Of no difference between the scores (n,) of two models on the same questions, two-sided.

    Args:
        resampled: means of the difference, resampled, where they are there already.
    """
    difference = second - first
    if right_or_wrong(first, second):
        return mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
    if resampled is None:
        resampled = _resampled(difference, seed)
    mean = difference.mean()
    return float((1 + (np.abs(resampled - mean) >= abs(mean)).sum()) / (1 + len(resampled)))


def right_or_wrong(*scores: Floats) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.isin(np.concatenate(scores), (0.0, 1.0)).all())


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Args:
        lost: questions that only the first model has right.
        won: questions that only the second has right.

    Source: McNemar 1947; exact binomial form, sum of both tails.
    """
    from scipy.stats import binomtest

    if lost + won == 0:
        return 1.0
    return float(binomtest(won, lost + won, 0.5).pvalue)


def _resampled(values: Floats, seed: int) -> Floats:
    """Means of resamples with replacement, a few million numbers at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(values))
    parts = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        parts.append(values[rng.integers(0, len(values), (count, len(values)))].mean(1))
    return np.concatenate(parts)
