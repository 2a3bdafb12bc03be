"""Results of the healing benchmark: finished parts into one file, and its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _healing_parts import OURS, PEERS, STAGES, Bench, key
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
        },
        "original": {"accuracy": _accuracy(bench, "original")},
        "removals": {},
    }
    for m in bench.options.remove:
        rows = {}
        for method, removed in bench.chosen(m).items():
            if not bench.done(f"patch/{key(removed)}"):
                continue
            distilled = f"distil/{key(removed)}"
            training = bench.read(distilled) if bench.done(distilled) else {}
            rows[method] = {
                "removed": removed,
                "tokens_seen": training.get("tokens_seen"),
                "losses": [s["loss"] for s in training.get("steps", [])],
                "patch": bench.read(f"patch/{key(removed)}")["patch"]["cuts"],
                "stages": {
                    stage: {
                        "texts": bench.read(name)["texts"],
                        "pooled": bench.pooled(removed, stage),
                        "accuracy": _accuracy(bench, f"{key(removed)}/{stage}"),
                    }
                    for stage in STAGES
                    if bench.done(name := f"judge/{key(removed)}/{stage}")
                },
            }
        found["removals"][str(m)] = rows
    write_json(path, RESULTS, found)
    return read_json(path, RESULTS)


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


def paired_ratio(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, int] | None:
    """Perplexity of the second over that of the first on the same samples.

    Returns:
        the ratio, its standard error (of the paired difference of log-perplexity, by the delta
        method) and the number of samples; None where the samples' losses were not kept.
    """
    if not first or not all("sample_nll" in t for s in (first, second) for t in s.values()):
        return None
    gaps = np.concatenate(
        [np.subtract(second[k]["sample_nll"], first[k]["sample_nll"]) for k in first]
    )
    counts = np.concatenate([first[k]["sample_tokens"] for k in first])
    ratio = float(np.exp(gaps.sum() / counts.sum()))
    error = float(standard_error(gaps[None], counts)[0])
    return ratio, ratio * error, len(counts)


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
        figures += _figures(m, rows, tasks)
    for name, value in figures:
        print(f"{name}: {value:.4g}")


def _table(m: str, rows: dict[str, Any], tasks: Sequence[str]) -> None:
    print(f"\n{m} blocks removed")
    header = f"{'':<17}{'stage':<9}{'perplexity':>11}{'KL':>8}{'+-':>7}{'recovered':>10}"
    print(f"{header}  {'accuracy':<15}blocks; tokens seen")
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
            tail = " ".join(map(str, row["removed"])) if stage == "cut" else ""
            if stage == "healed":
                tail = f"{row['tokens_seen']} tokens"
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


def recovered(row: dict[str, Any], stage: str) -> float | None:
    """Percent of the lost log-perplexity that is back at a stage."""
    stages = row["stages"]
    if stage == "cut" or not {"cut", stage} <= set(stages):
        return None
    cut, now = stages["cut"]["pooled"], stages[stage]["pooled"]
    return 100 * (cut["nll"] - now["nll"]) / (cut["nll"] - cut["original_nll"])


def _figures(m: str, rows: dict[str, Any], tasks: Sequence[str]) -> list[tuple[str, float]]:
    ours = rows.get(OURS)
    if ours is None:
        return []
    found: list[tuple[str, float]] = []
    for name, stage in (("recovered_percent", "healed"), ("patch_percent", "patched")):
        won = recovered(ours, stage)
        if won is not None:
            found.append((f"{name}_{m}", won))
    peers = {p: rows[p] for p in PEERS if p in rows and "healed" in rows[p]["stages"]}
    if "healed" not in ours["stages"] or len(peers) < len(PEERS):
        return found
    best = min(peers, key=lambda p: peers[p]["stages"]["healed"]["pooled"]["nll"])
    mine, theirs = (r["stages"] for r in (ours, peers[best]))
    ratio = np.exp(mine["healed"]["pooled"]["nll"] - theirs["healed"]["pooled"]["nll"])
    found.append((f"healed_ppl_over_best_peer_{m}", float(ratio)))
    paired = paired_ratio(theirs["healed"]["texts"], mine["healed"]["texts"])
    if paired is not None:
        value, error, samples = paired
        print(
            f"  healed: perplexity of {OURS} over that of the best peer ({best}): "
            f"{value:.3f} ± {error:.3f}, paired over {samples} samples"
        )
    before = min(r["stages"]["cut"]["pooled"]["nll"] for r in peers.values())
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


def _percent(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"
