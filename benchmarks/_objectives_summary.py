"""Results of the study of objectives: finished parts into one file, its table and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import read_json, write_json
from isingcut.models.sources import model_identity

if TYPE_CHECKING:
    from objectives import Study

KIND = "objectives-benchmark"
documents.KINDS[KIND] = documents.Strict
TASKS = ("arc_easy", "piqa", "lambada", "hellaswag")
STAGES = ("patched", "healed")
DEFAULT = "wiki_python"
"""The mixture that a run takes where no text is given."""
SETTINGS = ("model", "remove", "tokens", "questions", "method", "steps", "rate", "patch_tokens")
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
"""KL on several texts, weighted."""


def collect(study: Study, path: Path) -> dict[str, Any]:
    """Write the results file from the finished parts."""
    o, store = study.options, study.store
    losses = {}
    for text in study.texts:
        if store.done(f"losses/{text}"):
            part = store.read(f"losses/{text}")
            count = sum(part["counts"])
            losses[text] = {
                "tokens": count,
                **{
                    k: (np.array(part[f"{k}_sums"]).sum(1) / count).round(5).tolist()
                    for k in ("kl", "nll")
                },
            }
    tasks = {t: store.read(f"tasks/{t}") for t in TASKS if store.done(f"tasks/{t}")}
    content = {
        "settings": {k: getattr(o, k) for k in SETTINGS},
        "provenance": {
            **versions(),
            "model": {**model_identity(study.folder), "name": o.model},
            "dtype": str(study.loaded.dtype),
        },
        "states": study.states,
        "losses": losses,
        "original": {t: part["right"][0] for t, part in tasks.items()},
        "right": {t: part["right"][1:] for t, part in tasks.items()},
        "certainties": {
            t: [" ".join(f"{v:.2f}" for v in row) for row in part["certainties"][1:]]
            for t, part in tasks.items()
        },
        "repaired": [store.read(part.name) for part in study.repairing() if store.done(part.name)],
    }
    for row in content["repaired"]:
        for k in ("format", "version", "part", "seconds"):
            row.pop(k, None)
        for stage in STAGES:
            row[stage].pop("certainties", None)
    write_json(path, KIND, content)
    return read_json(path, KIND)


def objectives(losses: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Losses (S,) of all states by the objective's name: of single texts, and of mixtures."""
    found = {}
    for text, row in losses.items():
        found[text], found[f"nll_{text}"] = np.array(row["kl"]), np.array(row["nll"])
    for name, weights in MIXTURES.items():
        if set(weights) <= set(losses):
            found[name] = sum(w * found[text] for text, w in weights.items())
    return found


@dataclass(frozen=True)
class Correlation:
    """Spearman of mean accuracy with a negative loss.

    Attributes:
        rho, low, high: the value and its 95 % interval.
        more, more_low, more_high: by how much it is above that of the objective compared with.
    """

    rho: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float


def correlations(
    right: list[np.ndarray[Any, Any]],
    losses: dict[str, np.ndarray[Any, Any]],
    against: str,
    rounds: int = 2000,
) -> dict[str, Correlation]:
    """Of each objective, with intervals by the bootstrap over states and questions.

    Args:
        right: (S, Q) of each task, 1 where right.
        losses: (S,) of each objective.
        against: the objective that the others are compared with.
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


def spread(values: Any, count: int) -> list[int]:
    """So many indices, evenly spaced in the order of the values, both ends among them."""
    order = np.argsort(values, kind="stable")
    count = min(count, len(order))
    return [int(i) for i in order[np.linspace(0, len(order) - 1, count).round().astype(int)]]


def lower_half(losses: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The half of the states of the lowest KL, mean over the texts."""
    mean = np.mean([row["kl"] for row in losses.values()], 0)
    return np.sort(np.argsort(mean)[: len(mean) // 2])


def _spearman(one: Any, rows: Any) -> Any:
    """Of one sequence (S,) with each of some rows (R, S): Pearson's of the ranks."""
    a, b = rankdata(one) - (len(one) + 1) / 2, rankdata(rows, axis=1) - (len(one) + 1) / 2
    return b @ a / np.sqrt((a @ a) * (b * b).sum(1))


def reliability(right: list[np.ndarray[Any, Any]], splits: int = 200) -> float:
    """Expected rank correlation of the mean accuracy with that on as many other questions."""
    half = half_spearman(right, right, splits)
    return 2 * half / (1 + half)


def half_spearman(
    ordering: list[np.ndarray[Any, Any]], right: list[np.ndarray[Any, Any]], splits: int = 200
) -> float:
    """Rank correlation of means on half of the questions with the accuracy on the other half.

    Args:
        ordering: (S, Q) of each task, in units in which tasks can be added.
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


def repaired(
    found: dict[str, Any], losses: dict[str, np.ndarray[Any, Any]], stage: str
) -> tuple[list[np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Of the repaired states, right answers (R, Q) by task, and (R,) of each objective: losses of
    the cut states, KL of the repaired ones (``own_``), and the cut states' errors."""
    rows = found["repaired"]
    at = [found["states"].index(row["state"]) for row in rows]
    right = {t: as_bits([row[stage]["right"][t] for row in rows]) for t in rows[0][stage]["right"]}
    cut = [as_bits(found["right"][t])[at].mean(1) for t in right if t in found["right"]]
    own = {
        f"own_{text}": np.array([row[stage]["losses"][text]["kl"] for row in rows])
        for text in rows[0][stage]["losses"]
    }
    cuts = {k: v[at] for k, v in losses.items()}
    return list(right.values()), {**cuts, **own, "cut_accuracy": 1 - np.mean(cut, 0)}


def as_bits(rows: list[str]) -> np.ndarray[Any, Any]:
    """(S, Q) from a string of each state."""
    return np.array([[int(b) for b in row] for row in rows])


def in_spreads(values: Any) -> np.ndarray[Any, Any]:
    """(S, Q) in units of their spread about each question's mean, as a choice adds tasks."""
    rows = np.array(values)
    return rows / (float((rows - rows.mean(0)).std()) or 1.0)


def show(found: dict[str, Any]) -> None:
    """The table, then one line a figure."""
    right = [as_bits(rows) for rows in found["right"].values()]
    losses = objectives(found["losses"])
    s = found["settings"]
    print(
        f"{s['model']}, {len(found['states'])} states without {s['remove']} blocks; "
        f"{', '.join(f'{t} {r.shape[1]}' for t, r in zip(found['right'], right, strict=True))} "
        "questions"
    )
    for task, r in zip(found["right"], right, strict=True):
        whole = np.mean([int(b) for b in found["original"][task]])
        low, high = 100 * r.mean(1).min(), 100 * r.mean(1).max()
        print(f"  {task}: original {100 * whole:.1f}, states {low:.1f} to {high:.1f} %")
    _table("all states", right, losses, list(found["right"]))
    half = lower_half(found["losses"])
    part = {k: v[half] for k, v in losses.items()}
    _table(f"the {len(half)} of lowest KL", [r[half] for r in right], part, list(found["right"]))
    rows = correlations(right, losses, DEFAULT)
    figures = {f"objective_spearman_{name}": row.rho for name, row in rows.items()}
    figures["reliability"] = reliability(right)
    if certain := [
        in_spreads([[float(v) for v in row.split()] for row in rows])
        for rows in found.get("certainties", {}).values()
    ]:
        figures["half_spearman_scores"] = half_spearman(right, right)
        figures["half_spearman_certainties"] = half_spearman(certain, right)
    for stage in STAGES if found.get("repaired") else ():
        answers, by = repaired(found, losses, stage)
        title = f"the {len(answers[0])} states {stage}"
        _table(title, answers, by, list(found["repaired"][0][stage]["right"]))
        after = correlations(answers, by, DEFAULT)
        figures |= {f"{stage}_spearman_{name}": row.rho for name, row in after.items()}
    prefix = "coder_" if s["model"] == "coder" else ""
    for name, value in figures.items():
        print(f"{prefix}{name}: {value:.4g}")
    best = max((k for k in MIXTURES if k in rows), key=lambda k: rows[k].rho)
    print(f"{prefix}default_objective: {best}\n")


def _table(
    title: str,
    right: list[np.ndarray[Any, Any]],
    losses: dict[str, np.ndarray[Any, Any]],
    tasks: list[str],
) -> None:
    rows = correlations(right, losses, DEFAULT)
    each = [_spearman(r.mean(1), -np.stack(list(losses.values()))) for r in right]
    print(f"\n{title}; the accuracy's reliability is {reliability(right):.2f}")
    print(f"{'':<30}{'all tasks':>10}{'95 %':>16}{'above ' + DEFAULT:>24}  {'  '.join(tasks)}")
    for k, name in sorted(enumerate(losses), key=lambda pair: -rows[pair[1]].rho):
        row = rows[name]
        cells = "  ".join(f"{e[k]:>{len(t)}.2f}" for t, e in zip(tasks, each, strict=True))
        more = f"{row.more:+.3f} ({row.more_low:+.2f} to {row.more_high:+.2f})"
        print(
            f"{name:<30}{row.rho:>10.3f}{f'{row.low:.2f} to {row.high:.2f}':>16}{more:>24}  {cells}"
        )
