"""Results of the study of objectives: finished parts into one file, its table and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import read_json, write_json
from isingcut.models.sources import model_identity

if TYPE_CHECKING:
    from objectives import Study

KIND = "objectives-benchmark"
documents.KINDS[KIND] = documents.Strict
TASKS = ("arc_easy", "piqa", "lambada", "hellaswag")
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
    tasks = {t: store.read(f"tasks/{t}")["right"] for t in TASKS if store.done(f"tasks/{t}")}
    content = {
        "settings": {k: getattr(o, k) for k in ("model", "remove", "tokens", "questions")},
        "provenance": {
            **versions(),
            "model": {**model_identity(study.folder), "name": o.model},
            "dtype": str(study.loaded.dtype),
        },
        "states": study.states,
        "losses": losses,
        "original": {t: rows[0] for t, rows in tasks.items()},
        "right": {t: rows[1:] for t, rows in tasks.items()},
    }
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


def correlations(
    right: list[np.ndarray[Any, Any]], losses: dict[str, np.ndarray[Any, Any]], rounds: int = 2000
) -> dict[str, tuple[float, float, float]]:
    """Spearman of mean accuracy with each negative loss, and its 95 % interval.

    Args:
        right: (S, Q) of each task, 1 where right.
        losses: (S,) of each objective.
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
    low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
    return {
        k: (float(r), float(a), float(b))
        for k, r, a, b in zip(names, _spearman(mean, table), low, high, strict=True)
    }


def _spearman(one: Any, rows: Any) -> Any:
    return np.array([spearmanr(one, row).statistic for row in rows])


def reliability(right: list[np.ndarray[Any, Any]], splits: int = 200) -> float:
    """Expected rank correlation of the mean accuracy with that on as many other questions."""
    draw, found = np.random.default_rng(0), []
    for _ in range(splits):
        halves = np.zeros((2, len(right[0])))
        for r in right:
            order = draw.permutation(r.shape[1])
            for half, part in zip(halves, np.array_split(order, 2), strict=True):
                half += r[:, part].mean(1)
        found.append(spearmanr(*halves).statistic)
    half = float(np.mean(found))
    return 2 * half / (1 + half)


def show(found: dict[str, Any]) -> None:
    """The table, then one line a figure."""
    right = [np.array([[int(b) for b in row] for row in rows]) for rows in found["right"].values()]
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
    rows = correlations(right, losses)
    each = [_spearman(r.mean(1), -np.stack(list(losses.values()))) for r in right]
    print(f"\n{'objective':<30}{'all tasks':>10}{'95 %':>16}  {'  '.join(found['right'])}")
    for k, name in sorted(enumerate(losses), key=lambda pair: -rows[pair[1]][0]):
        rho, low, high = rows[name]
        cells = "  ".join(f"{e[k]:>{len(t)}.2f}" for t, e in zip(found["right"], each, strict=True))
        print(f"{name:<30}{rho:>10.3f}{f'{low:.2f} to {high:.2f}':>16}  {cells}")
    print(f"\nreliability: {reliability(right):.3f}")
    for name, (rho, _, _) in rows.items():
        print(f"objective_spearman_{name}: {rho:.4g}")
    mixtures = [name for name in MIXTURES if name in rows]
    if mixtures:
        print(f"default_objective: {max(mixtures, key=lambda name: rows[name][0])}")
