"""Tables and figures of the results file of the accuracy study."""

from __future__ import annotations

from studies.runner import Content
from studies.runner_models import as_bits, difference, mean_accuracy, mean_loss

OURS = "isingcut"
AGAINST = {
    "block_influence": "block-influence",
    "sleb": "sleb",
    "window": "angular-window",
}


def show(content: Content) -> dict[str, float]:
    """Print the tables and return the figures."""
    tasks, figures = content["tasks"], dict[str, float]()
    print(f"settings: {content['settings']}")
    _row("original", "", content["original"]["accuracy"], None, tasks, "")
    for m, rows in content["removals"].items():
        print(f"\n{m} blocks removed")
        shared = shared_tasks(rows, tasks)
        for stage, those in shared.items():
            if those != tasks:
                print(f"{stage}: mean over {', '.join(those) or 'nothing'}")
        print(f"{'':<27}{'stage':<9}{'mean':>13}{'ours minus it':>17}  tasks; KL by text; blocks")
        ours = {k: s["accuracy"] for k, s in rows.get(OURS, {"stages": {}})["stages"].items()}
        for method, row in rows.items():
            for stage, found in row["stages"].items():
                against = ours.get("cut" if method == OURS else stage)
                if method == OURS and stage == "cut":
                    against = None
                kl = {text: mean_loss([x], "kl") for text, x in found["losses"].items()}
                texts = ", ".join(f"{text} {value:.3f}" for text, value in kl.items())
                blocks = " ".join(map(str, row["removed"])) if stage == "cut" else ""
                _row(method, stage, found["accuracy"], against, shared[stage], f"{texts}; {blocks}")
        figures |= figures_of(m, rows, shared)
    return figures


def shared_tasks(rows: Content, tasks: list[str]) -> dict[str, list[str]]:
    """Return, by stage, the tasks that all its models were evaluated on."""
    found: dict[str, list[str]] = {}
    for row in rows.values():
        for stage, content in row["stages"].items():
            found[stage] = [t for t in found.get(stage, tasks) if t in content["accuracy"]]
    return found


def _row(
    method: str,
    stage: str,
    accuracy: Content,
    against: Content | None,
    tasks: list[str],
    tail: str,
) -> None:
    whole, mean, gap = mean_accuracy(accuracy, tasks), "", ""
    both = [t for t in tasks if against and _count(t, against) == _count(t, accuracy)]
    if whole:
        mean = f"{100 * whole[0]:.1f} ± {100 * whole[1]:.1f}"
    if whole and against and both:
        value, error = difference(accuracy, against, both)
        gap = f"{100 * value:+.1f} ± {196 * error:.1f}"
    shares = {t: 100 * as_bits(a["right"]).mean() for t, a in accuracy.items()}
    cells = ", ".join(f"{t} {share:.1f}" for t, share in shares.items())
    print(f"{method:<27}{stage:<9}{mean:>13}{gap:>17}  {cells}; {tail}")


def _count(task: str, accuracy: Content) -> int:
    return len(accuracy[task]["right"]) if task in accuracy else 0


def figures_of(m: str, rows: Content, shared: dict[str, list[str]]) -> dict[str, float]:
    """Return paired differences in points, if both models have answers to the shared tasks."""
    found: dict[str, float] = {}

    def compare(name: str, method: str, stage: str) -> None:
        pair = [rows[r]["stages"].get(stage, {"accuracy": {}})["accuracy"] for r in (method, OURS)]
        tasks = shared.get(stage, [])
        if tasks and all(t in accuracy for accuracy in pair for t in tasks):
            gap, error = difference(*pair, tasks)
            found.update({f"{name}_{m}": 100 * gap, f"{name}_{m}_se": 100 * error})

    for name, method in AGAINST.items():
        if {method, OURS} <= set(rows):
            compare(f"accuracy_minus_{name}", method, "cut")
    healed = {
        method: whole[0]
        for method, row in rows.items()
        if method != OURS and "healed" in row["stages"]
        if (whole := mean_accuracy(row["stages"]["healed"]["accuracy"], shared["healed"]))
    }
    if healed and OURS in rows:
        compare("healed_accuracy_minus_best_peer", max(healed, key=healed.__getitem__), "healed")
    return found
