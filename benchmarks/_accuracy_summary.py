"""Results of the accuracy benchmark: finished parts into one file, and its tables and figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _accuracy_parts import GENERATED, Bench
from _accuracy_states import OURS, SCALED
from _healing_summary import difference, mean_accuracy, right
from _healing_work import KIND, key
from isingcut.errors import InputError
from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import read_json, write_json
from isingcut.models.sources import model_identity

RESULTS = "accuracy-benchmark"
documents.KINDS[RESULTS] = documents.Strict
SETTINGS = (
    *("model", "calibration", "state_tokens", "judged_tokens", "questions"),
    *("conversations", "method", "steps", "batch", "length", "rate", "patch_tokens", "seed"),
)
JUDGED = {"kl": "sample_kl", "nll": "sample_nll", "counts": "sample_tokens"}
AGAINST = {
    "block_influence": "block-influence",
    "sleb": "sleb",
    "window": "angular-window",
}


def collect(bench: Bench, path: Path) -> dict[str, Any]:
    """Write the results file from the finished parts."""
    o = bench.options
    tasks = [t for t in o.tasks if bench.gathered(f"shared/{t}")]
    shared = {t: bench.gathered(f"shared/{t}") for t in tasks}
    losses = {t: bench.gathered(f"losses/{t}") for t in bench.judged_names}

    def answers(name: str, where: str) -> dict[str, Any]:
        found = {t: rows[name] for t, rows in shared.items() if name in rows}
        return {**found, **_answers(bench, where, GENERATED)}

    found: dict[str, Any] = {
        "settings": {k: getattr(o, k) for k in SETTINGS},
        "provenance": {
            **versions(),
            "model": {**model_identity(bench.original.folder), "name": o.model},
        },
        "tasks": tasks,
        "original": {"accuracy": answers("original", "original")},
        "losses": {t: rows.get("original") for t, rows in losses.items()},
        "removals": {},
    }
    for m in o.remove:
        rows: dict[str, Any] = {}
        for method, removed in bench.chosen(m).items():
            name = key(removed)
            texts = {t: r[name] for t, r in losses.items() if name in r}
            stages = {"cut": {"accuracy": answers(name, f"{name}/cut"), "losses": texts}}
            for _, blocks, stage in [x for x in _repaired(bench, m) if x[0] == method]:
                content = _stage(bench, blocks, stage, tasks)
                if any(content.values()):
                    stages[stage] = content
            for kind in SCALED if method == OURS else ():
                scaled = f"{name} {kind}"
                if asked := {t: r[scaled] for t, r in shared.items() if scaled in r}:
                    texts = {t: r[scaled] for t, r in losses.items() if scaled in r}
                    stages[kind] = {"accuracy": asked, "losses": texts}
            part = bench.read(f"states/{method}/{m}")
            rows[method] = {"removed": removed, "passes": part["passes"], "stages": stages}
        found["removals"][str(m)] = rows
    write_json(path, RESULTS, found)
    return read_json(path, RESULTS)


def _repaired(bench: Bench, m: int) -> list[tuple[str, list[int], str]]:
    return bench.scored(m) if bench.cut_losses() else []


def _stage(bench: Bench, removed: list[int], stage: str, tasks: list[str]) -> dict[str, Any]:
    where, texts = f"{key(removed)}/{stage}", {}
    if bench.done(name := f"judge/{where}"):
        for text, t in bench.read(name)["texts"].items():
            texts[text] = {short: t[long] for short, long in JUDGED.items()}
    return {"accuracy": _answers(bench, where, [*tasks, *GENERATED]), "losses": texts}


def _answers(bench: Bench, where: str, tasks: Iterable[str]) -> dict[str, Any]:
    """Of one model that was asked alone."""
    parts = {t: f"accuracy/{where}/{t}" for t in tasks}
    return {t: _row_of(bench.read(name)) for t, name in parts.items() if bench.done(name)}


def _row_of(part: dict[str, Any]) -> dict[str, Any]:
    return {k: part[k] for k in ("metric", "dtype", "right")}


def restore(bench: Bench, path: Path) -> None:
    """Put what a results file holds into the work folder, as finished parts.

    No checkpoint comes back: a model that more is to be asked of is repaired again.

    Raises:
        InputError: it was made with other options; of a task that it lacks any number of questions
            may be asked.
    """
    found = read_json(path, RESULTS)
    _same_options(bench, found, path)
    asked: dict[str, dict[str, Any]] = {f"shared/{t}": {} for t in found["tasks"]}
    asked |= {f"losses/{t}": {} for t in bench.judged_names}
    parts: dict[str, dict[str, Any]] = {}

    def alone(where: str, accuracy: dict[str, Any]) -> None:
        parts.update({f"accuracy/{where}/{t}": row for t, row in accuracy.items()})

    def together(name: str, where: str, accuracy: dict[str, Any], losses: dict[str, Any]) -> None:
        alone(where, {t: row for t, row in accuracy.items() if t in GENERATED})
        for task in accuracy.keys() - GENERATED:
            asked[f"shared/{task}"][name] = accuracy[task]
        for text, row in losses.items():
            asked[f"losses/{text}"][name] = {k: row[k] for k in ("kl", "nll")}

    together("original", "original", found["original"]["accuracy"], found["losses"])
    for m, rows in found["removals"].items():
        for method, row in rows.items():
            parts[f"states/{method}/{m}"] = {k: row[k] for k in ("removed", "passes")}
            name = key(row["removed"])
            for stage, content in row["stages"].items():
                accuracy, losses = content["accuracy"], content["losses"]
                if stage == "cut" or stage in SCALED:
                    called = name if stage == "cut" else f"{name} {stage}"
                    together(called, f"{name}/cut", accuracy, losses)
                    continue
                alone(f"{name}/{stage}", accuracy)
                if losses:
                    texts = {
                        t: {long: x[short] for short, long in JUDGED.items()}
                        for t, x in losses.items()
                    }
                    parts[f"judge/{name}/{stage}"] = {"texts": texts}
    for folder, content in asked.items():
        counts = {}
        if folder.startswith("losses/"):
            counts = {"counts": found["losses"][folder.removeprefix("losses/")]["counts"]}
        parts[f"{folder}/restored"] = {**counts, "rows": content}
    for name, content in parts.items():
        if not bench.done(name):
            write_json(bench.path(name), KIND, content)


def _same_options(bench: Bench, found: dict[str, Any], path: Path) -> None:
    theirs = dict(found["settings"])
    counts = theirs.pop("questions")
    mine = {k: getattr(bench.options, k) for k in theirs}
    for task in [*found["tasks"], *GENERATED]:
        theirs[task], mine[task] = counts.get(task, counts["each"]), bench.questions(task)
    for name, value in theirs.items():
        if mine[name] != value:
            raise InputError(
                f"{path} was made with {name} {value}, not {mine[name]}; give the same"
            )


def show(found: dict[str, Any]) -> None:
    """Tables, then one line a figure."""
    tasks = found["tasks"]
    print(f"settings: {found['settings']}")
    _row("original", "", found["original"]["accuracy"], None, tasks, "")
    figures: list[tuple[str, float]] = []
    for m, rows in found["removals"].items():
        print(f"\n{m} blocks removed")
        shared = {stage: _asked(rows, stage, tasks) for stage in _stages(rows)}
        for stage, those in shared.items():
            if those != tasks:
                print(f"{stage}: mean over {', '.join(those) or 'nothing'}")
        print(f"{'':<27}{'stage':<9}{'mean':>13}{'ours minus it':>17}  tasks; KL by text; blocks")
        for method, row in rows.items():
            for stage, content in row["stages"].items():
                against, those = _against(rows, method, stage), shared[stage]
                texts = ", ".join(f"{t} {_mean(x):.3f}" for t, x in content["losses"].items())
                blocks = " ".join(map(str, row["removed"])) if stage == "cut" else ""
                tail = f"{texts}; {blocks}"
                _row(method, stage, content["accuracy"], against, those, tail)
        figures += _figures(m, rows, shared)
    for name, value in figures:
        print(f"{name}: {value:.4g}")


def _against(rows: dict[str, Any], method: str, stage: str) -> dict[str, Any] | None:
    """What a row is compared with: our model of that stage, and ours repaired with ours cut."""
    found = rows.get(OURS, {"stages": {}})["stages"].get("cut" if method == OURS else stage)
    return None if found is None or (method == OURS and stage == "cut") else found["accuracy"]


def _stages(rows: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(stage for row in rows.values() for stage in row["stages"]))


def _asked(rows: dict[str, Any], stage: str, tasks: list[str]) -> list[str]:
    """The tasks that every model of a stage was asked."""
    asked = [row["stages"][stage]["accuracy"] for row in rows.values() if stage in row["stages"]]
    return [t for t in tasks if all(t in accuracy for accuracy in asked)]


def _count(task: str, accuracy: dict[str, Any]) -> int:
    return len(accuracy[task]["right"]) if task in accuracy else 0


def _mean(text: dict[str, Any], what: str = "kl") -> float:
    return float(sum(text[what]) / sum(text["counts"]))


def _row(
    method: str,
    stage: str,
    accuracy: dict[str, Any],
    against: dict[str, Any] | None,
    tasks: list[str],
    tail: str,
) -> None:
    whole = mean_accuracy(accuracy, tasks)
    mean = f"{100 * whole[0]:.1f} ± {100 * whole[1]:.1f}" if whole else ""
    gap = ""
    both = [t for t in tasks if against and _count(t, against) == _count(t, accuracy)]
    if whole and against and both:
        value, error = difference(accuracy, against, both)
        gap = f"{100 * value:+.1f} ± {196 * error:.1f}"
    cells = ", ".join(f"{t} {100 * right(a).mean():.1f}" for t, a in accuracy.items())
    print(f"{method:<27}{stage:<9}{mean:>13}{gap:>17}  {cells}; {tail}")


def _figures(m: str, rows: dict[str, Any], shared: dict[str, list[str]]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []

    def against(name: str, method: str, stage: str) -> None:
        pair = [rows[r]["stages"].get(stage, {"accuracy": {}})["accuracy"] for r in (method, OURS)]
        tasks = shared.get(stage, [])
        if tasks and all(t in a for a in pair for t in tasks):
            gap, error = difference(*pair, tasks)
            found.extend([(f"{name}_{m}", 100 * gap), (f"{name}_{m}_se", 100 * error)])

    if OURS not in rows:
        return found
    for name, method in AGAINST.items():
        if method in rows:
            against(f"accuracy_minus_{name}", method, "cut")
    healed = {
        method: whole[0]
        for method, row in rows.items()
        if method != OURS and "healed" in row["stages"]
        if (whole := mean_accuracy(row["stages"]["healed"]["accuracy"], shared["healed"]))
        is not None
    }
    if healed:
        against("healed_accuracy_minus_best_peer", max(healed, key=lambda p: healed[p]), "healed")
    return found
