"""Tables and figures of the results files of the study of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from studies.runner import Content
from studies.runner_models import Bits, as_bits

REPAIRED = ("patched", "healed")
DEFAULT = "wiki_python"
"""Mixture that a run takes by default."""
MIXTURES: dict[str, dict[str, float]] = {
    "wiki_python": {"wiki": 0.75, "python": 0.25},
    "web_instruct_maths": {"web": 0.5, "instruct": 0.3, "maths": 0.2},
    "web_answers_maths": {"web": 0.5, "answers": 0.3, "maths": 0.2},
    "web_stories": {"web": 0.5, "stories": 0.5},
    "web_qa": {"web": 0.5, "qa": 0.5},
    "web_stories_qa": {"web": 0.4, "stories": 0.3, "qa": 0.3},
    "web_wiki_instruct_code_maths": dict.fromkeys(
        ("web", "wiki", "instruct", "python", "maths"), 0.2
    ),
}
"""Weights of the KL on several texts."""


def objectives(losses: Content) -> dict[str, Bits]:
    """Return the losses (S,) of all states by objective: on single texts, and on mixtures."""
    found = {}
    for text, row in losses.items():
        found[text], found[f"nll_{text}"] = np.array(row["kl"]), np.array(row["nll"])
    for name, weights in MIXTURES.items():
        if set(weights) <= set(losses):
            found[name] = sum(w * found[text] for text, w in weights.items())
    return found


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of mean accuracy with a negative loss.

    Attributes:
        rho, low, high: value and its 95 % interval.
        more, more_low, more_high: excess over the reference objective and its 95 % interval.
    """

    rho: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float


def correlations(
    right: Sequence[Bits],
    losses: Mapping[str, Bits],
    against: str,
    rounds: int = 2000,
) -> dict[str, Correlation]:
    """Return each objective's correlation, with bootstrap intervals over states and questions.

    Args:
        right: (S, Q) of each task, 1 for a right answer.
        losses: (S,) of each objective.
        against: name of the reference objective.
    """
    draw = np.random.default_rng(0)
    mean = np.mean([r.mean(1) for r in right], 0)
    names = list(losses)
    table = -np.stack([losses[k] for k in names])
    resampled = np.empty((rounds, len(names)))
    for i in range(rounds):
        states = draw.integers(len(mean), size=len(mean))
        asked = [r[states][:, draw.integers(r.shape[1], size=r.shape[1])].mean(1) for r in right]
        resampled[i] = _spearman(np.mean(asked, 0), table[:, states])
    found, one = _spearman(mean, table), names.index(against)
    low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
    least, most = np.nanpercentile(resampled - resampled[:, [one]], [2.5, 97.5], axis=0)
    rows = zip(found, low, high, found - found[one], least, most, strict=True)
    return {k: Correlation(*map(float, row)) for k, row in zip(names, rows, strict=True)}


def lower_half(losses: Content) -> Bits:
    """Return the indices of the half of the states with the lowest mean KL over the texts."""
    mean = np.mean([row["kl"] for row in losses.values()], 0)
    return np.sort(np.argsort(mean)[: len(mean) // 2])


def _spearman(one: Any, rows: Any) -> Any:
    """Return Spearman's correlation (R,) of a sequence (S,) with each of some rows (R, S)."""
    a, b = rankdata(one) - (len(one) + 1) / 2, rankdata(rows, axis=1) - (len(one) + 1) / 2
    return b @ a / np.sqrt((a @ a) * (b * b).sum(1))


def reliability(right: Sequence[Bits], splits: int = 200) -> float:
    """Return the expected rank correlation of accuracies on two sets of as many questions."""
    half = half_spearman(right, right, splits)
    return 2 * half / (1 + half)


def half_spearman(ordering: Sequence[Bits], right: Sequence[Bits], splits: int = 200) -> float:
    """Return the rank correlation of means on half of the questions with accuracy on the others.

    Args:
        ordering: (S, Q) of each task, in units that can be added over tasks.
    """
    draw, found = np.random.default_rng(0), []
    for _ in range(splits):
        first, second = np.zeros((2, len(right[0])))
        for o, r in zip(ordering, right, strict=True):
            one, other = np.array_split(draw.permutation(r.shape[1]), 2)
            first += o[:, one].mean(1)
            second += r[:, other].mean(1)
        found.append(_spearman(first, second[None])[0])
    return float(np.mean(found))


def in_spreads(values: Any) -> Bits:
    """Return values (S, Q) over their spread about each question's mean, as a choice adds tasks."""
    rows = np.array(values)
    return rows / (float((rows - rows.mean(0)).std()) or 1.0)


def answers(rows: Sequence[str]) -> Bits:
    """Return an array (S, Q), 1 for right answers."""
    return np.array([as_bits(row) for row in rows])


def repaired(
    content: Content, losses: Mapping[str, Bits], stage: str
) -> tuple[dict[str, Bits], dict[str, Bits]]:
    """Return the repaired states' right answers (R, Q) by task, and (R,) by objective: losses of
    the cut states, KL of the repaired ones (``own_``), and the cut states' error rates."""
    rows, cut = content["repaired"], content["right"]
    at = [content["states"].index(row["state"]) for row in rows]
    right = {t: answers([r[stage]["right"][t] for r in rows]) for t in rows[0][stage]["right"]}
    by = {name: values[at] for name, values in losses.items()}
    for text in rows[0][stage]["losses"]:
        by[f"own_{text}"] = np.array([row[stage]["losses"][text]["kl"] for row in rows])
    by["cut_accuracy"] = 1 - np.mean([answers(cut[t])[at].mean(1) for t in right if t in cut], 0)
    return right, by


def show(content: Content) -> dict[str, Any]:
    """Print the tables and return the figures."""
    right = {task: answers(rows) for task, rows in content["right"].items()}
    losses, s = objectives(content["losses"]), content["settings"]
    counts = ", ".join(f"{t} {r.shape[1]}" for t, r in right.items())
    print(
        f"{s['model']}, {len(content['states'])} states without {s['remove']} blocks; {counts} "
        "questions"
    )
    for task, r in right.items():
        whole, shares = 100 * as_bits(content["original"][task]).mean(), 100 * r.mean(1)
        low, high = shares.min(), shares.max()
        print(f"  {task}: original {whole:.1f}, states {low:.1f} to {high:.1f} %")
    rows = _table("all states", right, losses)
    half = lower_half(content["losses"])
    title = f"the {len(half)} of lowest KL"
    _table(title, {t: r[half] for t, r in right.items()}, {k: v[half] for k, v in losses.items()})
    figures: dict[str, Any] = {f"objective_spearman_{k}": row.rho for k, row in rows.items()}
    bits = list(right.values())
    figures["reliability"] = reliability(bits)
    if said := content.get("certainties"):
        certain = [
            in_spreads([[float(v) for v in row.split()] for row in rows]) for rows in said.values()
        ]
        figures["half_spearman_scores"] = half_spearman(bits, bits)
        figures["half_spearman_certainties"] = half_spearman(certain, bits)
    for stage in REPAIRED if content.get("repaired") else ():
        after, by = repaired(content, losses, stage)
        found = _table(f"the {len(content['repaired'])} states {stage}", after, by)
        figures |= {f"{stage}_spearman_{name}": row.rho for name, row in found.items()}
    figures["default_objective"] = max(
        (k for k in MIXTURES if k in rows), key=lambda k: rows[k].rho
    )
    prefix = "coder_" if s["model"] == "coder" else ""
    return {prefix + name: value for name, value in figures.items()}


def _table(
    title: str, right: Mapping[str, Bits], losses: Mapping[str, Bits]
) -> dict[str, Correlation]:
    bits, table = list(right.values()), -np.stack(list(losses.values()))
    rows = correlations(bits, losses, DEFAULT)
    each = {task: _spearman(r.mean(1), table) for task, r in right.items()}
    print(f"\n{title}; the accuracy's reliability is {reliability(bits):.2f}")
    print(f"{'':<30}{'all tasks':>10}{'95 %':>16}{'above ' + DEFAULT:>24}  {'  '.join(right)}")
    for k, name in sorted(enumerate(losses), key=lambda pair: -rows[pair[1]].rho):
        row = rows[name]
        cells = "  ".join(f"{values[k]:>{len(task)}.2f}" for task, values in each.items())
        more = f"{row.more:+.3f} ({row.more_low:+.2f} to {row.more_high:+.2f})"
        print(
            f"{name:<30}{row.rho:>10.3f}{f'{row.low:.2f} to {row.high:.2f}':>16}{more:>24}  {cells}"
        )
    return rows
