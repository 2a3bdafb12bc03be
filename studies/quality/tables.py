"""From choices and judged states to tables with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error
from studies.runner import Content
from studies.runner_models import key, mean_loss

OURS = ("refined", "refined-joint")
"""Entries of the product's own search: neither is a baseline of the other."""
RESAMPLES = 2000
Rows = Mapping[str, Content]
"""Losses of judged states on one text, by key."""


def judged_text(rows: Rows) -> Content:
    """What a text that judged holds, and the original's perplexity there."""
    original = rows["original"]
    return {
        "samples": len(original["counts"]),
        "tokens": sum(original["counts"]),
        "original_ppl": short(np.exp(mean_loss([original], "nll"))),
    }


def tables(choices: Sequence[Content], losses: Mapping[str, Rows]) -> list[Content]:
    """One table for each text chosen on and number of blocks, of what is judged everywhere."""
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
    """The run of median pooled KL; of an even number the better of the two in the middle."""
    ordered = sorted(runs, key=lambda r: (r["kl"], r["seed"]))
    return ordered[(len(ordered) - 1) // 2]


def compare(losses: Mapping[str, Rows], keys: Mapping[str, str], what: str) -> Content:
    """Each method's mean loss with its distance from the lowest, and ours against the rest.

    The bootstrap resamples samples, the same ones for all methods; pooled texts are resampled
    within each text.
    """
    names = list(keys)
    sums = {t: np.array([r[k][what] for k in keys.values()]) for t, r in losses.items()}
    counts = {t: np.array(r[keys[names[0]]]["counts"]) for t, r in losses.items()}
    drawn, held = np.zeros((RESAMPLES, len(names))), np.zeros((RESAMPLES, 1))
    for place, text in enumerate(sorted(losses)):
        m = len(counts[text])
        draw = np.random.default_rng([0xB007, place])
        weights = draw.multinomial(m, np.full(m, 1 / m), RESAMPLES)
        drawn += weights @ sums[text].T
        held += (weights @ counts[text])[:, None]
    draws, whole = drawn / held, np.concatenate(list(sums.values()), 1)
    tokens = np.concatenate(list(counts.values()))
    means, errors = whole.sum(1) / tokens.sum(), standard_error(whole, tokens)
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
                "rank": rank(means, i, others),
                "of": len(others) + 1,
                "lowest": bool(means[i] <= means[best]),
                "within_interval": bool(interval[0] <= 0),
            }
    return found


def rank(means: Floats, i: int, others: list[int]) -> float:
    """1 for the lowest; methods that found the same state share the mean of their ranks."""
    below = int((means[others] < means[i]).sum())
    equal = int((means[others] == means[i]).sum())
    return 1 + below + equal / 2


def _interval(draws: Floats) -> list[float]:
    return [short(v) for v in np.percentile(draws, [2.5, 97.5])]


def short(value: Any) -> float:
    """Six digits of a number."""
    return float(f"{float(value):.6g}")
