"""From the finished parts to one small results file: tables, paired intervals, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from _quality_bench import Bench
from _quality_judge import Chosen, Judged, load_judged, rows_chosen, thinned
from _quality_summary import OURS
from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import write_json
from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error

KIND = "quality"
documents.KINDS[KIND] = documents.Strict
RESAMPLES = 2000


def collect(bench: Bench, path: Path) -> dict[str, Any]:
    """Write the results file from what is finished; what is not is named in it."""
    judged = {t: j for t in bench.judged_on if (j := load_judged(bench, t)) is not None}
    rows = rows_chosen(bench)
    content = {
        "provenance": _provenance(bench),
        "judged": {t: _judged_text(j) for t, j in judged.items()},
        "tables": _tables(rows, judged),
        "accuracy": _accuracy(bench, rows),
        "estimators": _estimators(bench),
        "large": _large(bench, judged),
        "minutes": _minutes(bench),
    }
    write_json(path, KIND, content)
    return content


def _provenance(bench: Bench) -> dict[str, Any]:
    made_with = versions()
    made_with.pop("command_line")
    commands = Path(bench.options.work) / "commands.txt"
    pools = {part["text"]: part["pool_tokens"] for _, part in bench.store.under("choose")}
    return {
        **made_with,
        "model": Path(bench.options.model).name,
        "settings": bench.settings(),
        "dtype": str(bench.loaded.dtype).removeprefix("torch."),
        "tokens_chosen_on": pools,
        "commands": commands.read_text(encoding="utf-8").splitlines() if commands.exists() else [],
    }


def _judged_text(judged: Judged) -> dict[str, Any]:
    total = judged.counts.sum()
    return {
        "samples": len(judged.counts),
        "tokens": int(total),
        "original_ppl": _round(np.exp(judged.original_nll.sum() / total)),
    }


def _minutes(bench: Bench) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in ("choose", "judge", "accuracy", "estimator", "large"):
        for _, part in bench.store.under(stage):
            found[stage] = found.get(stage, 0.0) + part["seconds"] / 60
    return {stage: round(value, 1) for stage, value in found.items()}


# tables -----------------------------------------------------------------------------------


def _tables(rows: list[dict[str, Any]], judged: dict[str, Judged]) -> list[dict[str, Any]]:
    """One table for each text chosen on and number of removals, of what is judged everywhere."""
    tables = []
    groups = sorted({(r["text"], r["remove"]) for r in rows}, key=lambda g: (g[0] == "instruct", g))
    for text, remove in groups:
        here = [r for r in rows if (r["text"], r["remove"]) == (text, remove)]
        whole = [
            r for r in here if judged and all(r["chosen"].key in j.kl for j in judged.values())
        ]
        if whole:
            tables.append(_table(text, remove, whole, judged))
    return tables


def _table(
    text: str, remove: int, rows: list[dict[str, Any]], judged: dict[str, Judged]
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)
    pooled = {r["chosen"].key: _mean(judged, r["chosen"].key, "kl") for r in rows}
    methods = {name: _median(found, pooled) for name, found in runs.items()}
    entries = [
        {
            "method": name,
            "seed": methods[name]["seed"],
            "removed": methods[name]["removed"],
            **({"merges": methods[name]["merges"]} if methods[name].get("merges") else {}),
            "passes": _round(methods[name]["passes"]),
            "heads": _round(methods[name]["heads"]),
            "runs": [
                {
                    "seed": r["seed"],
                    "removed": r["removed"],
                    "passes": _round(r["passes"]),
                    "heads": _round(r["heads"]),
                    "kl": _round(pooled[r["chosen"].key]),
                }
                for r in sorted(found, key=lambda r: int(r["seed"]))
            ],
        }
        for name, found in runs.items()
    ]
    views = {**{t: {t: j} for t, j in judged.items()}, "pooled": judged}
    keys = {name: row["chosen"].key for name, row in methods.items()}
    losses = {
        view: {metric: _compared(part, keys, metric) for metric in ("kl", "nll")}
        for view, part in views.items()
    }
    return {"chosen_on": text, "remove": remove, "methods": entries, "losses": losses}


def _median(runs: list[dict[str, Any]], pooled: dict[str, float]) -> dict[str, Any]:
    """The run of median pooled KL; of an even number the better of the two in the middle."""
    ordered = sorted(runs, key=lambda r: (pooled[r["chosen"].key], r["seed"]))
    return ordered[(len(ordered) - 1) // 2]


def _mean(judged: dict[str, Judged], key: str, metric: str) -> float:
    total = sum(float(getattr(j, metric)[key].sum()) for j in judged.values())
    return total / sum(int(j.counts.sum()) for j in judged.values())


def _compared(judged: dict[str, Judged], keys: dict[str, str], metric: str) -> dict[str, Any]:
    """Each method's mean loss with its distance from the lowest, and ours against the rest.

    The bootstrap resamples samples, the same ones for all methods; pooled texts are resampled
    within each text.
    """
    names = list(keys)
    means, draws = _bootstrap(judged, [keys[n] for n in names], metric)
    lowest = int(np.argmin(means))
    errors = _errors(judged, [keys[n] for n in names], metric)
    found: dict[str, Any] = {"lowest": names[lowest], "methods": {}}
    for i, name in enumerate(names):
        low, high = np.percentile(draws[:, i] - draws[:, lowest], [2.5, 97.5])
        found["methods"][name] = {
            "value": _round(means[i]),
            "se": _round(errors[i]),
            "over_lowest_interval": [_round(low), _round(high)],
        }
    others = [i for i, name in enumerate(names) if name not in OURS]
    for name in OURS:
        if name in names and others:
            i = names.index(name)
            best = others[int(np.argmin(means[others]))]
            ratio = np.percentile(draws[:, i] / draws[:, best], [2.5, 97.5])
            difference = np.percentile(draws[:, i] - draws[:, best], [2.5, 97.5])
            found[name] = {
                "best_other": names[best],
                "ratio": _round(means[i] / means[best]),
                "ratio_interval": [_round(v) for v in ratio],
                "difference": _round(means[i] - means[best]),
                "difference_interval": [_round(v) for v in difference],
                "rank": _rank(means, i, others),
                "of": len(others) + 1,
                "lowest": bool(means[i] <= means[best]),
                "within_interval": bool(difference[0] <= 0),
            }
    return found


def _rank(means: Floats, i: int, others: list[int]) -> float:
    """1 for the lowest; methods that found the same state share the mean of their ranks."""
    below = int((means[others] < means[i]).sum())
    equal = int((means[others] == means[i]).sum())
    return 1 + below + equal / 2


def _bootstrap(judged: dict[str, Judged], keys: list[str], metric: str) -> tuple[Floats, Floats]:
    """Means (K,) and resampled means (RESAMPLES, K) over all tokens of the texts."""
    sums, counts = np.zeros(len(keys)), 0
    drawn, held = np.zeros((RESAMPLES, len(keys))), np.zeros((RESAMPLES, 1))
    for place, name in enumerate(sorted(judged)):
        j = judged[name]
        values = np.array([getattr(j, metric)[key] for key in keys])
        m = len(j.counts)
        rng = np.random.default_rng([0xB007, place])
        weights = rng.multinomial(m, np.full(m, 1 / m), RESAMPLES)
        drawn += weights @ values.T
        held += (weights @ j.counts)[:, None]
        sums += values.sum(1)
        counts += int(j.counts.sum())
    return sums / counts, drawn / held


def _errors(judged: dict[str, Judged], keys: list[str], metric: str) -> Floats:
    parts = list(judged.values())
    values = np.concatenate([np.array([getattr(j, metric)[k] for k in keys]) for j in parts], 1)
    return standard_error(values, np.concatenate([j.counts for j in parts]))


# the rest ---------------------------------------------------------------------------------


def accuracy_states(bench: Bench) -> dict[str, Chosen]:
    """What is scored on the tasks: each method's first seed on the first text, and nothing
    removed."""
    found = {"": Chosen(())}
    for row in rows_chosen(bench):
        if (
            row["text"] == bench.chosen_on[0]
            and row["seed"] == 0
            and row["remove"] in bench.options.accuracy_remove
        ):
            found[row["chosen"].key] = row["chosen"]
    return found


def _accuracy(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy with its standard error, by task, for the first seed of each method."""
    right: dict[tuple[str, str], dict[str, str]] = {}
    for _, part in bench.store.under("accuracy"):
        for row in part["states"]:
            right[part["task"], row["key"]] = row
    tasks = sorted({task for task, _ in right})

    def scores(key: str) -> dict[str, Any]:
        return {
            task: {m: _share(v) for m, v in right[task, key].items() if m != "key"}
            for task in tasks
            if (task, key) in right
        }

    found = [{"method": "original", "remove": 0, "tasks": scores("")}]
    for row in rows:
        key = row["chosen"].key
        if row["text"] == bench.chosen_on[0] and row["seed"] == 0 and scores(key):
            found.append({"method": row["method"], "remove": row["remove"], "tasks": scores(key)})
    usual = {task: next(iter(metrics)) for task, metrics in found[0]["tasks"].items()}
    return [{**found[0], "usual": usual}, *found[1:]]


def _share(bits: str) -> dict[str, float]:
    n, p = len(bits), bits.count("1") / len(bits)
    return {"value": _round(p), "se": _round((p * (1 - p) / max(1, n - 1)) ** 0.5), "n": n}


def _estimators(bench: Bench) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in part.items() if k not in ("format", "version", "seconds")}
        for name, part in bench.store.under("estimator")
        if name.startswith("estimator/M")
    ]


def _large(bench: Bench, judged: dict[str, Judged]) -> dict[str, Any]:
    """The traces of the long searches: tokens spent against the KL on the judged texts."""
    found: dict[str, Any] = {}
    for name, part in bench.store.under("large"):
        steps = []
        for step in thinned(part["trace"], 8):
            key = Chosen(tuple(step["removed"])).key
            known = bool(judged) and all(key in j.kl for j in judged.values())
            steps.append(
                {
                    "token_passes": round(step["passes"] * part["pool_tokens"]),
                    "removed": step["removed"],
                    "kl": _round(_mean(judged, key, "kl")) if known else None,
                }
            )
        kept = {
            k: v
            for k, v in part.items()
            if k not in ("format", "version", "seconds", "part", "trace")
        }
        found[name.split("/")[1]] = {**kept, "trace": steps}
    return found


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")
