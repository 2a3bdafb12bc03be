"""Tables and figures of the results files of the healing study."""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np

from isingcut.measure.losses import standard_error
from studies.runner import Content

OURS = "isingcut"
PEERS = ("block-influence", "angular-window", "sleb")
STAGES = ("cut", "patched", "tuned")
"""Stages before the trainings; those are named by their tokens, such as `healed 0.1M`."""
SPREAD = "{:+.1f} ± {:.1f}"
GENERATED = "gsm8k"
"""Task that no mean over tasks includes."""


def show(content: Content) -> dict[str, float]:
    """Print the tables and return the figures."""
    settings = content["settings"]
    figures = {}
    print(f"states: {content['states_from']}; settings: {settings}")
    if accuracy := content.get("original", {}).get("accuracy"):
        print(f"original{_shares(accuracy)}")
    for m, rows in content["removals"].items():
        _table(m, rows)
        if OURS in rows:
            _tuning(rows)
            figures |= _figures(m, rows)
    return {settings["prefix"] + name: value for name, value in figures.items()}


def paired(first: Content, second: Content, what: str) -> tuple[float, float, int]:
    """Compare two losses on the same samples of some texts.

    Returns:
        second - first in nats per token, its standard error and the number of samples.
    """
    name = f"sample_{what}"
    gaps = np.concatenate([np.subtract(second[k][name], first[k][name]) for k in first])
    counts = np.concatenate([first[k]["sample_tokens"] for k in first])
    error = float(standard_error(gaps[None], counts)[0])
    return float(gaps.sum() / counts.sum()), error, len(counts)


def _table(m: str, rows: Content) -> None:
    print(f"\n{m} blocks removed")
    header = (
        f"{'':<27}{'stage':<13}{'perplexity':>11}{'KL':>8}{'+-':>7}{'recovered':>10}"
    )
    print(
        f"{header}  perplexity/KL by text; blocks; tokens seen; right answers, in percent"
    )
    ours = rows.get(OURS, {"stages": {}})["stages"]
    for method, row in rows.items():
        asked = [s["accuracy"] for s in row["stages"].values() if s.get("accuracy")]
        for stage, found in row["stages"].items():
            pooled = found["pooled"]
            won = f"{'':>10}" if stage == "cut" else f"{_recovered(row, stage):9.1f}%"
            tail = ", ".join(
                f"{k} {exp(t['nll']):.2f}/{t['kl']:.3f}"
                for k, t in found["texts"].items()
            )
            if stage == "cut":
                tail += "; " + " ".join(map(str, row["removed"]))
            if "tokens_seen" in found:
                tail += f"; {found['tokens_seen']} tokens" + "; stopped" * bool(
                    found["stopped"]
                )
            if accuracy := found.get("accuracy"):
                tail += (
                    f"{_shares(accuracy)}, {SPREAD.format(*points(asked[0], accuracy))}"
                )
                same = ours.get(stage, {}).get("accuracy")
                if same and method != OURS:
                    tail += (
                        f"; {OURS} minus it {SPREAD.format(*points(accuracy, same))}"
                    )
            print(
                f"{method:<27}{stage:<13}{exp(pooled['nll']):>11.3f}{pooled['kl']:>8.4f}"
                f"{pooled['kl_se']:>7.4f}{won}  {tail}"
            )


def _shares(accuracy: Content) -> str:
    """Return the percentage of right answers by task, and their mean."""
    shares = {task: _bits(row).mean() for task, row in accuracy.items()}
    words = ", ".join(f"{task} {100 * share:.1f}" for task, share in shares.items())
    shares.pop(GENERATED, None)
    return f"; {words}; mean {100 * np.mean([*shares.values()]):.1f}"


def points(first: Content, second: Content) -> tuple[float, float]:
    """Return the mean of second - first over tasks of the same questions, and half its interval."""
    shared = [task for task in first if task in second and task != GENERATED]
    pairs = [(_bits(first[task]), _bits(second[task])) for task in shared]
    gaps = [b - a for a, b in pairs if len(a) == len(b)]
    error = np.sqrt(sum(rows.var(ddof=1) / len(rows) for rows in gaps)) / len(gaps)
    return float(100 * np.mean([rows.mean() for rows in gaps])), float(196 * error)


def _bits(row: Content) -> Any:
    """Return 1 (right) or 0 (wrong) for each question (Q,)."""
    return np.array(list(row["right"]), dtype=float)


def _tuning(rows: Content) -> None:
    """Print the losses of the tuned patch minus those by least squares, with 95 % intervals."""
    stages = rows[OURS]["stages"]
    if not {"patched", "tuned"} <= set(stages):
        return
    before, after = (stages[stage]["texts"] for stage in ("patched", "tuned"))
    for name in ("all texts", *before):
        one, two = (
            (t if name == "all texts" else {name: t[name]}) for t in (before, after)
        )
        found = {what: paired(one, two, what) for what in ("kl", "nll")}
        words = [
            f"{w.upper()} {gap:+.4f} ± {1.96 * se:.4f}"
            for w, (gap, se, _) in found.items()
        ]
        print(f"  tuned minus least squares, {name}, nats, 95 %: {', '.join(words)}")


def _recovered(row: Content, stage: str) -> float:
    """Return the percentage of the log-perplexity lost on a stage's texts that is recovered."""
    lost = 0.0
    recovered = 0.0
    for name, now in row["stages"][stage]["texts"].items():
        cut = row["stages"]["cut"]["texts"][name]
        lost += cut["tokens"] * (cut["nll"] - cut["original_nll"])
        recovered += cut["tokens"] * (cut["nll"] - now["nll"])
    return 100 * recovered / lost


def _figures(m: str, rows: Content) -> dict[str, float]:
    ours = rows[OURS]
    found = dict[str, float]()
    for stage in ours["stages"]:
        tokens = stage.removeprefix("healed ").replace(" ", "_")
        if stage == "tuned":
            found[f"patch_percent_{m}"] = _recovered(ours, stage)
        elif stage == "cut":
            found |= _over_peers(rows, stage, "kl", f"kl_over_best_peer_{m}")
            found |= _over_peers(rows, stage, "nll", f"cut_ppl_over_best_peer_{m}")
        elif stage.startswith("healed"):
            found[f"recovered_percent_{m}_at_{tokens}"] = _recovered(ours, stage)
            name = f"healed_ppl_over_best_peer_{m}_{tokens}"
            found |= _over_peers(rows, stage, "nll", name)
    return found


def _over_peers(rows: Content, stage: str, what: str, name: str) -> dict[str, float]:
    """Return our KL or perplexity at a stage over the best peer's, and its paired error."""
    judged = {p: r["stages"][stage] for p, r in rows.items() if stage in r["stages"]}
    peers = [p for p in judged if p != OURS]
    if not peers:
        return {}
    best = min(peers, key=lambda p: judged[p]["pooled"][what])
    gap, error, samples = paired(judged[best]["texts"], judged[OURS]["texts"], what)
    level = judged[best]["pooled"]["kl"]
    ratio, error = (
        (1 + gap / level, error / level)
        if what == "kl"
        else (exp(gap), exp(gap) * error)
    )
    print(
        f"  {stage}: {what} of {OURS} over that of the best of {len(peers)} peers ({best}): "
        f"{ratio:.3f} ± {error:.3f}, paired over {samples} samples"
    )
    return {name: ratio, f"{name}_se": error}
