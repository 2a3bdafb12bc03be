"""Results of the healing benchmark: finished parts into one file, and its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _healing_parts import OURS, PEERS, STAGES, Bench
from _healing_work import key
from isingcut.evaluation.paired import compare_scores
from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import read_json, write_json
from isingcut.measure.losses import standard_error
from isingcut.models.sources import model_identity

RESULTS = "healing-benchmark"
documents.KINDS[RESULTS] = documents.Strict


def collect(bench: Bench, path: Path) -> dict[str, Any]:
    """Write the results file from the finished parts."""
    settings = read_json(bench.work / "settings.json", "healing-settings")
    found: dict[str, Any] = {
        "settings": {k: v for k, v in settings.items() if k not in ("format", "version")},
        "states_from": bench.read("states")["from"],
        "provenance": {
            **versions(),
            "model": {**model_identity(bench.original.folder), "name": bench.options.model},
            "dtype": str(bench.original.dtype),
        },
        "original": {"accuracy": _accuracy(bench, "original")},
        "removals": {},
    }
    for m in bench.options.remove:
        rows = {}
        for method, removed in bench.chosen(m).items():
            if not bench.done(f"patched/{key(removed)}"):
                continue
            after_trial = bench.after_trial(m) if method == OURS else method
            kept = bench.chosen(m)[after_trial] if after_trial else []
            distilled, tried = f"distil/{key(kept)}", f"try/{key(removed)}"
            training = bench.read(distilled) if bench.done(distilled) else {}
            rows[method] = {
                "removed": removed,
                "healed_state_of": after_trial,
                "trial": _content(bench.read(tried)) if bench.done(tried) else None,
                "tokens_seen": training.get("tokens_seen"),
                "losses": [s["loss"] for s in training.get("steps", [])],
                "patch": bench.read(f"patched/{key(removed)}")["patch"]["cuts"],
                "stages": {
                    stage: {
                        "texts": bench.read(name)["texts"],
                        "pooled": bench.pooled(blocks, stage),
                        "accuracy": _accuracy(bench, f"{key(blocks)}/{stage}"),
                    }
                    for stage in STAGES
                    for blocks in [kept if stage == "healed" else removed]
                    if bench.done(name := f"judge/{key(blocks)}/{stage}")
                },
            }
        found["removals"][str(m)] = rows
    write_json(path, RESULTS, found)
    return read_json(path, RESULTS)


def _content(part: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k not in ("format", "version", "seconds")}


def _accuracy(bench: Bench, where: str) -> dict[str, Any]:
    found = {}
    for task in bench.options.tasks:
        name = f"accuracy/{where}/{task}"
        if bench.done(name):
            part = bench.read(name)
            found[task] = {
                "metric": part["metric"].removesuffix(",none"),
                "right": "".join(map(str, part["values"])),
            }
    return found


def right(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Right (1) or wrong (0) by question."""
    return np.array(list(row["right"]), dtype=float)


def mean_accuracy(accuracy: dict[str, Any], tasks: Sequence[str]) -> tuple[float, float] | None:
    """Mean over the tasks, with its standard error; None where a task is missing."""
    if not tasks or any(t not in accuracy for t in tasks):
        return None
    values = [right(accuracy[t]) for t in tasks]
    error = np.sqrt(sum(v.var(ddof=1) / len(v) for v in values)) / len(values)
    return float(np.mean([v.mean() for v in values])), float(error)


def difference(first: dict[str, Any], second: dict[str, Any], tasks: Sequence[str]) -> Any:
    """Mean over the tasks of second - first, with the standard error of paired questions."""
    gaps = [right(second[t]) - right(first[t]) for t in tasks]
    error = np.sqrt(sum(g.var(ddof=1) / len(g) for g in gaps)) / len(gaps)
    return float(np.mean([g.mean() for g in gaps])), float(error)


def paired(
    first: dict[str, Any], second: dict[str, Any], what: str = "nll"
) -> tuple[float, float, int] | None:
    """Nats a token that the second has more than the first on the same samples.

    Args:
        what: ``nll`` or ``kl``.

    Returns:
        the difference, its standard error and the number of samples; None where the samples'
        figures were not kept.
    """
    name = f"sample_{what}"
    if not first or not all(name in t for s in (first, second) for t in s.values()):
        return None
    gaps = np.concatenate([np.subtract(second[k][name], first[k][name]) for k in first])
    counts = np.concatenate([first[k]["sample_tokens"] for k in first])
    error = float(standard_error(gaps[None], counts)[0])
    return float(gaps.sum() / counts.sum()), error, len(counts)


def paired_ratio(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, int] | None:
    """Perplexity of the second over that of the first, its standard error (by the delta method)
    and the number of samples, as `paired`."""
    found = paired(first, second)
    if found is None:
        return None
    gap, error, samples = found
    return float(np.exp(gap)), float(np.exp(gap)) * error, samples


def show(found: dict[str, Any]) -> None:
    """Tables, then one line a figure."""
    figures: list[tuple[str, float]] = []
    s = found["settings"]
    print(f"states: {found['states_from']}; settings: {s}")
    tasks = sorted(found["original"]["accuracy"])
    whole = mean_accuracy(found["original"]["accuracy"], tasks)
    if whole is not None:
        print(f"original: accuracy {_percent(whole)}, mean of {', '.join(tasks)}")
    for m, rows in found["removals"].items():
        _table(m, rows, tasks)
        _tuning(rows)
        _trial(rows)
        figures += _figures(m, rows, tasks, 1 if s.get("peers") == "best" else len(PEERS))
    prefix = "coder_" if s.get("model") == "coder" else ""
    for name, value in figures:
        print(f"{prefix}{name}: {value:.4g}")


def _table(m: str, rows: dict[str, Any], tasks: Sequence[str]) -> None:
    print(f"\n{m} blocks removed")
    header = f"{'':<17}{'stage':<9}{'perplexity':>11}{'KL':>8}{'+-':>7}{'recovered':>10}"
    print(f"{header}  {'accuracy':<15}perplexity/KL by text; blocks; tokens seen")
    for method in (OURS, *PEERS):
        row = rows.get(method)
        for stage in STAGES if row else ():
            found = row["stages"].get(stage)
            if found is None:
                continue
            pooled = found["pooled"]
            won = recovered(row, stage)
            words = f"{won:9.1f}%" if won is not None else f"{'':>10}"
            accuracy = mean_accuracy(found["accuracy"], tasks)
            texts = found["texts"].items()
            tail = ", ".join(f"{k} {np.exp(t['nll']):.2f}/{t['kl']:.3f}" for k, t in texts)
            if stage == "cut":
                tail += "; " + " ".join(map(str, row["removed"]))
            if stage == "healed":
                tail += f"; {row['tokens_seen']} tokens"
            print(
                f"{method:<17}{stage:<9}{np.exp(pooled['nll']):>11.3f}{pooled['kl']:>8.4f}"
                f"{pooled['kl_se']:>7.4f}{words}  {_percent(accuracy):<15}{tail}"
            )
    for task in tasks:
        cells = []
        for method in (OURS, *PEERS):
            for stage, found in (rows.get(method) or {"stages": {}})["stages"].items():
                if task in found["accuracy"]:
                    values = right(found["accuracy"][task])
                    error = 100 * values.std(ddof=1) / np.sqrt(len(values))
                    cells.append(f"{method} {stage} {100 * values.mean():.1f}±{error:.1f}")
        if cells:
            print(f"  {task}: {', '.join(cells)}")


def _tuning(rows: dict[str, Any]) -> None:
    """The tuned patch against the one by least squares, with 95 % intervals."""
    stages = (rows.get(OURS) or {"stages": {}})["stages"]
    if not {"patched", "tuned"} <= set(stages):
        return
    before, after = (stages[stage]["texts"] for stage in ("patched", "tuned"))
    for name in ("all texts", *before):
        one, two = ((t if name == "all texts" else {name: t[name]}) for t in (before, after))
        words = [
            f"{what.upper()} {found[0]:+.4f} ± {1.96 * found[1]:.4f}"
            for what in ("kl", "nll")
            if (found := paired(one, two, what)) is not None
        ]
        print(f"  tuned minus least squares, {name}, nats, 95 %: {', '.join(words)}")


def _trial(rows: dict[str, Any]) -> None:
    """What a few steps of healing showed of the candidates, and whose state was chosen."""
    ours = rows.get(OURS) or {}
    if not (chosen := ours.get("healed_state_of")) or not ours.get("trial"):
        return
    for method, row in rows.items():
        if trial := row.get("trial"):
            gap, error, samples = paired({"": ours["trial"]}, {"": trial}, "kl") or (0.0, 0.0, 0)
            print(
                f"  trial of {method}'s state: KL {trial['kl']:.4f}, perplexity "
                f"{np.exp(trial['nll']):.3f}; KL minus that of {OURS}'s {gap:+.4f} ± {error:.4f}, "
                f"paired over {samples} samples"
            )
    whose = "its own state" if chosen == OURS else f"the state of {chosen}"
    print(f"  {OURS} chose {whose} after trial; its healed stage is of that state")


def recovered(row: dict[str, Any], stage: str) -> float | None:
    """Percent of the lost log-perplexity that is back at a stage."""
    stages = row["stages"]
    if stage == "cut" or not {"cut", stage} <= set(stages):
        return None
    cut, now = stages["cut"]["pooled"], stages[stage]["pooled"]
    return 100 * (cut["nll"] - now["nll"]) / (cut["nll"] - cut["original_nll"])


def _figures(
    m: str, rows: dict[str, Any], tasks: Sequence[str], needed: int
) -> list[tuple[str, float]]:
    ours = rows.get(OURS)
    if ours is None:
        return []
    found: list[tuple[str, float]] = []
    for name, stage in (("recovered_percent", "healed"), ("patch_percent", "tuned")):
        won = recovered(ours, stage)
        if won is not None:
            found.append((f"{name}_{m}", won))
    peers = {p: rows[p] for p in PEERS if p in rows and "healed" in rows[p]["stages"]}
    if "healed" not in ours["stages"] or len(peers) < needed:
        return found
    best = min(peers, key=lambda p: peers[p]["stages"]["healed"]["pooled"]["nll"])
    mine, theirs = (r["stages"] for r in (ours, peers[best]))
    theirs_removed = peers[best]["removed"]
    ratio = np.exp(mine["healed"]["pooled"]["nll"] - theirs["healed"]["pooled"]["nll"])
    found.append((f"healed_ppl_over_best_peer_{m}", float(ratio)))
    paired = paired_ratio(theirs["healed"]["texts"], mine["healed"]["texts"])
    if paired is not None:
        value, error, samples = paired
        print(
            f"  healed: perplexity of {OURS} over that of the best peer ({best}): "
            f"{value:.3f} ± {error:.3f}, paired over {samples} samples"
            + (" (the same state)" if _healed_state(rows, ours) == theirs_removed else "")
        )
    before = min(rows[p]["stages"]["cut"]["pooled"]["nll"] for p in PEERS if p in rows)
    found.append(
        (f"cut_ppl_over_best_peer_{m}", float(np.exp(mine["cut"]["pooled"]["nll"] - before)))
    )
    scored = [r["healed"]["accuracy"] for r in (theirs, mine)]
    if tasks and all(t in a for a in scored for t in tasks):
        gap, error = difference(*scored, tasks)
        print(
            f"  healed: {OURS} minus the best peer ({best}): {100 * gap:+.2f} ± {100 * error:.2f} "
            "points, mean of the tasks, paired by question"
        )
        for task in tasks:
            c = compare_scores(right(scored[0][task]), right(scored[1][task]))
            noise = "more than noise" if c.more_than_noise else "within noise"
            print(
                f"    {task}: {100 * (c.second - c.first):+.1f} points, p {c.p_value:.2g}, {noise}"
            )
        found.append((f"healed_accuracy_minus_best_peer_{m}", 100 * gap))
    return found


def _healed_state(rows: dict[str, Any], ours: dict[str, Any]) -> list[int]:
    """The blocks that our healed state is without."""
    found: list[int] = rows[ours.get("healed_state_of") or OURS]["removed"]
    return found


def _percent(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"
