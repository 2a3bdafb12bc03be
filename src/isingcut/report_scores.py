"""Scores before and after as rows with bars: evaluation, healing, benchmarks, and the headline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isingcut.report_files import RunFiles
from isingcut.report_words import comparison, plus_minus


@dataclass(frozen=True)
class Bar:
    """One value as a text and a bar under it.

    Attributes:
        text: the value, with its error.
        style: the bar's length and whisker, custom properties in percent; empty for no bar.
    """

    text: str
    style: str = ""


@dataclass(frozen=True)
class Row:
    """One quantity of both models, and the change in words."""

    name: str
    before: Bar
    after: Bar
    change: str
    note: str = ""


def bar(value: float | None, error: float | None, text: str, whole: float) -> Bar:
    """A value with a bar whose full length is ``whole``."""
    if value is None or not whole or value < 0:
        return Bar(text)
    length = 100 * value / whole
    style = f"--v:{length:.2f}%"
    if error is not None:
        low = max(0.0, 100 * (value - error) / whole)
        style += f";--a:{low:.2f}%;--w:{100 * (value + error) / whole - low:.2f}%"
    return Bar(text, style)


_KEYS = (
    "perplexity",
    "nll",
    "kl",
    "blocks",
    "parameters",
    "bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "peak_memory_bytes",
)


def comparison_bars(evaluation: Mapping[str, Any]) -> list[Row]:
    """The before/after table, each value with a bar and its standard error as a whisker."""
    before, after = dict(evaluation["before"]), dict(evaluation["after"])
    before |= {"kl": 0.0, "kl_se": None}
    after |= {"kl": evaluation["kl"], "kl_se": evaluation["kl_se"]}
    rows = []
    for key, (name, first, second, change) in zip(_KEYS, comparison(evaluation), strict=True):
        pair = [(s.get(key), s.get(f"{key}_se")) for s in (before, after)]
        whole = max((v + (e or 0.0) for v, e in pair if v is not None), default=0.0)
        bars = [bar(v, e, t, whole) for (v, e), t in zip(pair, (first, second), strict=True)]
        rows.append(Row(name, bars[0], bars[1], change))
    return rows


def benchmark_rows(found: list[dict[str, Any]]) -> list[Row]:
    """Tasks with the scores of both models; bars reach from 0 to 1, or to the largest score."""
    whole = max(1.0, *(float(r[k]) for r in found for k in ("original", "cut") if r[k] is not None))
    rows = []
    for r in found:
        bars = []
        for side in ("original", "cut"):
            value, error = r[side], r.get(f"{side}_se")
            text = "not measured" if value is None else plus_minus(float(value), error)
            bars.append(bar(value, error, text, whole))
        change = ""
        if r["original"] is not None and r["cut"] is not None:
            change = f"{float(r['cut']) - float(r['original']):+.4f}"
        n = f", n = {r['n']}" if r.get("n") else ""
        rows.append(Row(str(r["task"]), bars[0], bars[1], change, f"{r['metric']}{n}"))
    return rows


def healing_rows(healing: dict[str, Any]) -> list[Row]:
    """Figures that the healing record holds both before and after."""
    before, after = healing.get("before") or {}, healing.get("after") or {}
    rows = []
    for key, first in before.items():
        second = after.get(key)
        numbers = all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in (first, second)
        )
        if not numbers or key.endswith("_se"):
            continue
        errors = [side.get(f"{key}_se") for side in (before, after)]
        whole = max(v + (e or 0.0) for v, e in zip((first, second), errors, strict=True))
        bars = [
            bar(v, e, plus_minus(float(v), e), whole)
            for v, e in zip((first, second), errors, strict=True)
        ]
        change = f"{100 * (second / first - 1):+.1f} %" if first else ""
        name = {"kl": "KL", "nll": "NLL"}.get(key, key.replace("_", " "))
        rows.append(Row(name, bars[0], bars[1], change))
    return rows


def tiles(files: RunFiles) -> list[tuple[str, str, str]]:
    """The headline figures: what, how much, and from what to what."""
    found = files.evaluation
    result: list[tuple[str, str, str]] = []
    if found is not None:
        before, after = found["before"], found["after"]
        result.append(
            (
                "parameters",
                _percent(before["parameters"], after["parameters"]),
                f"{before['parameters'] / 1e6:.1f} → {after['parameters'] / 1e6:.1f} million",
            )
        )
    known = [b.get("kv_bytes_per_token") for b in files.blocks]
    cache = [float(c) for c in known if c is not None]
    whole = float(sum(cache))
    if files.removed is not None and len(cache) == len(known) and whole:
        gone = sum(cache[i] for i in files.removed)
        words = f"{whole / 1e3:.1f} → {(whole - gone) / 1e3:.1f} kB per token"
        result.append(("KV cache", _percent(whole, whole - gone), words))
    if found is None:
        return result
    speed = "decode_tokens_per_second"
    if before.get(speed) and after.get(speed):
        words = f"{before[speed]:.1f} → {after[speed]:.1f} tokens/s, measured"
        result.append(("decode speed", _percent(before[speed], after[speed]), words))
    words = f"{before['perplexity']:.2f} → {after['perplexity']:.2f}, unseen text"
    result.append(("perplexity", _percent(before["perplexity"], after["perplexity"]), words))
    words = "nats/token to the original" + (
        "" if found["kl_se"] is None else f", ± {found['kl_se']:.3f}"
    )
    result.append(("KL", f"{found['kl']:.3f}", words))
    return result


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else ""
