"""Tables of the choices and of their losses, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error
from studies.runner import Content
from studies.runner_models import key, mean_loss

OURS = ("refined", "refined-joint")
"""Entries of the product's own search; neither is a baseline of the other."""
RESAMPLES = 2000
Rows = Mapping[str, Content]
"""Losses of states on one evaluation text, by the states' keys."""


def judged_text(rows: Rows) -> Content:
    """Return the size of an evaluation text and the original's perplexity on it."""
    original = rows["original"]
    return {
        "samples": len(original["counts"]),
        "tokens": sum(original["counts"]),
        "original_ppl": short(np.exp(mean_loss([original], "nll"))),
    }


def tables(choices: Sequence[Content], losses: Mapping[str, Rows]) -> list[Content]:
    """Return a table per choice text and number of blocks, of states evaluated on all texts."""
    groups = {(c["text"], c["remove"]) for c in choices}
    found = []
    for text, remove in sorted(groups, key=lambda g: (g[0] == "instruct", g)):
        here = [
            c
            for c in choices
            if (c["text"], c["remove"]) == (text, remove)
            and all(key(c["removed"]) in rows for rows in losses.values())
        ]
        if here and losses:
            found.append({"chosen_on": text, "remove": remove, **_table(here, losses)})
    return found


def _table(choices: Sequence[Content], losses: Mapping[str, Rows]) -> Content:
    runs: dict[str, list[Content]] = {}
    for choice in choices:
        kl = mean_loss([rows[key(choice["removed"])] for rows in losses.values()], "kl")
        rounded = {k: short(choice[k]) for k in ("passes", "heads")}
        run = {k: choice[k] for k in ("seed", "removed")} | rounded | {"kl": short(kl)}
        runs.setdefault(choice["method"], []).append(run)
    methods = []
    for name, found in runs.items():
        typical = {k: v for k, v in median_run(found).items() if k != "kl"}
        found.sort(key=lambda r: int(r["seed"]))
        methods.append({"method": name, **typical, "runs": found})
    views = {**{text: {text: rows} for text, rows in losses.items()}, "pooled": losses}
    keys = {m["method"]: key(m["removed"]) for m in methods}
    compared = {
        view: {what: compare(part, keys, what) for what in ("kl", "nll")}
        for view, part in views.items()
    }
    return {"methods": methods, "losses": compared}


def median_run(runs: Sequence[Content]) -> Content:
    """Return the run of median pooled KL, for an even number the better of the middle two."""
    ordered = sorted(runs, key=lambda r: (r["kl"], r["seed"]))
    return ordered[(len(ordered) - 1) // 2]


def compare(losses: Mapping[str, Rows], keys: Mapping[str, str], what: str) -> Content:
    """Return each method's mean loss and distance from the lowest, and ours against the others.

    The bootstrap resamples samples, the same ones for all methods; pooled texts are resampled
    within each text.
    """
    names = list(keys)
    sums = {t: np.array([r[k][what] for k in keys.values()]) for t, r in losses.items()}
    counts = {t: np.array(r[keys[names[0]]]["counts"]) for t, r in losses.items()}
    drawn = np.zeros((RESAMPLES, len(names)))
    held = np.zeros((RESAMPLES, 1))
    for place, text in enumerate(sorted(losses)):
        m = len(counts[text])
        draw = np.random.default_rng([0xB007, place])
        weights = draw.multinomial(m, np.full(m, 1 / m), RESAMPLES)
        drawn += weights @ sums[text].T
        held += (weights @ counts[text])[:, None]
    draws = drawn / held
    whole = np.concatenate(list(sums.values()), 1)
    tokens = np.concatenate(list(counts.values()))
    means = whole.sum(1) / tokens.sum()
    errors = standard_error(whole, tokens)
    lowest = int(np.argmin(means))
    found: Content = {"lowest": names[lowest], "methods": {}}
    for i, name in enumerate(names):
        found["methods"][name] = {
            "value": short(means[i]),
            "se": short(errors[i]),
            "over_lowest_interval": _interval(draws[:, i] - draws[:, lowest]),
        }
    others = [i for i, name in enumerate(names) if name not in OURS]
    for name in OURS:
        if name in names and others:
            i = names.index(name)
            best = others[int(np.argmin(means[others]))]
            interval = _interval(draws[:, i] - draws[:, best])
            found[name] = {
                "best_other": names[best],
                "ratio": short(means[i] / means[best]),
                "ratio_interval": _interval(draws[:, i] / draws[:, best]),
                "difference": short(means[i] - means[best]),
                "difference_interval": interval,
                "lowest": bool(means[i] <= means[best]),
                "within_interval": bool(interval[0] <= 0),
            }
    return found


def _interval(draws: Floats) -> list[float]:
    return [short(v) for v in np.percentile(draws, [2.5, 97.5])]


def short(value: Any) -> float:
    """Return a number rounded to six digits."""
    return float(f"{float(value):.6g}")
