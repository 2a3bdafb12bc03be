"""Scores before and after as rows with bars: evaluation, healing, benchmarks, and the headline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isingcut.report.run_files import RunFiles
from isingcut.report.words import comparison, listed, plus_minus


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


def benchmark_rows(found: Mapping[str, Any]) -> list[Row]:
    """Tasks with the scores of both models, and the perplexity on WikiText-2 where it is there.

    Bars of scores reach from 0 to 1. The change has its 95 % interval where the two models were
    compared question by question; a change within the noise is called so.
    """
    rows = []
    for r in found["rows"]:
        whole = max(1.0, float(r["original"]), float(r["cut"]))
        bars = [
            bar(r[side], r.get(f"{side}_se"), plus_minus(r[side], r.get(f"{side}_se")), whole)
            for side in ("original", "cut")
        ]
        change = f"{r['cut'] - r['original']:+.4f}"
        if r.get("difference_low") is not None:
            change += f" ({r['difference_low']:+.3f} to {r['difference_high']:+.3f})"
        notes = [r["metric"], f"n = {r['n']}"]
        if r.get("shots"):
            notes.append(f"{r['shots']} shots")
        if r.get("more_than_noise") is False:
            notes.append("within the noise")
        rows.append(Row(str(r["task"]), bars[0], bars[1], change, ", ".join(notes)))
    text = found.get("wikitext2")
    if text is not None:
        first, second = (text[k] for k in ("original", "cut"))
        note = f"perplexity, {text['tokens']} tokens"
        rows.append(_pair("WikiText-2", "perplexity", first, second, ".2f", note))
    return rows


def _pair(
    name: str, key: str, before: Mapping[str, Any], after: Mapping[str, Any], form: str, note: str
) -> Row:
    values = [(float(s[key]), s.get(f"{key}_se")) for s in (before, after)]
    whole = max(v + (e or 0.0) for v, e in values)
    bars = [bar(v, e, plus_minus(v, e, form), whole) for v, e in values]
    (first, _), (second, _) = values
    change = f"{100 * (second / first - 1):+.1f} %" if first else ""
    return Row(name, bars[0], bars[1], change, note)


def healing_rows(healing: Mapping[str, Any]) -> list[Row]:
    """Perplexity, NLL and KL of the cut model before and after healing."""
    before, after = healing["before"], healing["after"]
    return [
        _pair(name, key, before, after, form, "")
        for name, key, form in (
            ("perplexity", "perplexity", ".2f"),
            ("NLL, nats/token", "nll", ".4f"),
            ("KL to the original, nats/token", "kl", ".4f"),
        )
        if before.get(key) is not None and after.get(key) is not None
    ]


def healing_words(healing: Mapping[str, Any]) -> str:
    """How the model was healed and on what the figures are measured."""
    said = []
    options = healing.get("options") or {}
    if healing.get("patch"):
        words = "A linear patch was fitted at each cut"
        scores = healing["patch"].get("scores")
        if scores:
            words += f" (alone it brings the KL to {plus_minus(scores['kl'], scores['kl_se'])})"
        said.append(words + ".")
    if healing.get("steps"):
        seen = healing.get("tokens_seen")
        tokens = "" if seen is None else f" over {seen:,} tokens"
        method = f" (`{options['method']}`)" if options.get("method") else ""
        said.append(f"Distillation from the original{method}{tokens}.")
    if healing.get("report_tokens"):
        said.append(f"Measured on {healing['report_tokens']} tokens that healing has not seen.")
    original = healing["before"].get("original_perplexity")
    if original is not None:
        said.append(f"The original has perplexity {original:.2f} there.")
    return " ".join(said)


def healed_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Candidates compared after a few steps of healing: blocks, KL before and after, chosen."""
    if found is None:
        return []
    return [
        (
            listed(row["removed"]),
            f"{row['kl_before']:.4f}",
            plus_minus(row["kl"], row["kl_se"]),
            "chosen" if row["removed"] == found["chosen"]["removed"] else "",
        )
        for row in sorted(found["candidates"], key=lambda r: float(r["kl"]))
    ]


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
