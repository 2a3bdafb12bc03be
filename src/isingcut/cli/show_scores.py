"""What the command line prints of healing and of benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from isingcut.console import console
from isingcut.report.words import plus_minus


def healing_warnings(found: dict[str, Any]) -> list[str]:
    """What a healing did not do, from its `healing.json`."""
    warnings = []
    asked, had = found["options"].get("length"), found.get("length", math.inf)
    if isinstance(asked, int) and asked > had:
        warnings.append(
            f"samples have {had} tokens instead of --length {asked}: the model has as many "
            "positions"
        )
    patch = found.get("patch")
    # A record of an older isingcut does not say.
    if patch is not None and not patch.get("changed", True):
        layers = ", ".join(f"block {c['block']}'s {c['layer']}" for c in patch["cuts"])
        warnings.append(
            f"the linear patch changed nothing ({layers}): on text held out no map was better than "
            "none, or it vanished in the weights' rounding; give more --patch-tokens, or distil"
        )
    return warnings


def show_healing(found: dict[str, Any], folder: Path) -> None:
    """Perplexity and KL before and after, on text held out."""
    before, after = found["before"], found["after"]
    stages = [("cut", before)]
    if "patch" in found:
        stages.append(("patched", found["patch"]["scores"]))
    if found["steps"]:
        stages.append(("distilled", after))
    table = Table(
        title=f"text held out: {found['report_tokens']} tokens; trained on "
        f"{found.get('tokens_seen', 0)} predictions in {len(found['steps'])} steps",
        title_justify="left",
    )
    for column in ("", "original", *(name for name, _ in stages)):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "perplexity",
        f"{before['original_perplexity']:.2f}",
        *(plus_minus(s["perplexity"], s["perplexity_se"], ".2f") for _, s in stages),
    )
    table.add_row("KL to the original", "0", *(plus_minus(s["kl"], s["kl_se"]) for _, s in stages))
    console().print(table)
    console().print(f"wrote {folder}", soft_wrap=True)


def show_benchmarks(found: dict[str, Any], file: Path) -> None:
    """Scores of both models, and whether each difference is more than noise."""
    table = Table(title="benchmarks, the same questions for both", title_justify="left")
    for column in ("task", "metric", "n", "original", "cut", "difference (95 %)", "p", ""):
        table.add_column(column, justify="left" if column in ("task", "metric", "") else "right")
    for r in found["rows"]:
        shots = f" {r['shots']}-shot" if r["shots"] else ""
        table.add_row(
            f"{r['task']}{shots}",
            r["metric"],
            str(r["n"]),
            _with_error(r["original"], r["original_se"]),
            _with_error(r["cut"], r["cut_se"]),
            f"{100 * r['difference']:+.1f} "
            f"({100 * r['difference_low']:+.1f} to {100 * r['difference_high']:+.1f})",
            f"{r['p_value']:.3g}",
            "more than noise" if r["more_than_noise"] else "within noise",
        )
    console().print(table)
    text = found.get("wikitext2")
    if text:
        first, second = (text[k] for k in ("original", "cut"))
        console().print(
            f"WikiText-2, {text['tokens']} tokens: perplexity {first['perplexity']:.2f} and "
            f"{second['perplexity']:.2f}, KL {text['kl']:.4f} nats/token",
            soft_wrap=True,
        )
    console().print(f"wrote {file}", soft_wrap=True)


def _with_error(value: float, error: float | None) -> str:
    return plus_minus(100 * value, None if error is None else 100 * error, ".1f")
