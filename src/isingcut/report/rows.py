"""The figures of several models as typed rows; terminal, pages and card only lay them out.

evaluation.json, healing.json, benchmarks.json -> rows, one a quantity -> cells, bars, sentences
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


def plus_minus(figure: float, error: float | None, form: str = ".4f") -> str:
    """A figure with its standard error, where there is one."""
    return f"{figure:{form}}" + ("" if error is None else f" ± {error:{form}}")


@dataclass(frozen=True)
class Value:
    """A figure with its standard error; None where that is not known."""

    figure: float
    error: float | None = None

    @property
    def low(self) -> float:
        """One standard error below."""
        return self.figure - (self.error or 0.0)

    @property
    def high(self) -> float:
        """One standard error above."""
        return self.figure + (self.error or 0.0)

    def text(self, form: str = ".4f") -> str:
        """The figure with its error; a zero that nobody measured is plain."""
        if self.figure == 0 and self.error is None:
            return "0"
        return plus_minus(self.figure, self.error, form)


@dataclass(frozen=True)
class Difference:
    """What changed from one model to another.

    Attributes:
        figure: in percent of the first model's, or in the row's own unit.
        percent: which of the two.
        low, high: ends of its 95 % interval, where the models were compared in pairs.
    """

    figure: float
    percent: bool = False
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.percent:
            return f"{self.figure:+.1f} %"
        interval = "" if self.low is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.figure:+.4f}{interval}"


@dataclass(frozen=True)
class Row:
    """One quantity of several models.

    Attributes:
        key: what the results file calls it.
        label: what people call it.
        unit: of the figures; empty for none.
        form: how the figures are written.
        values: by model (``original``, ``cut``, ``patched``, ``healed``), in the order of the
            columns; None where a model was not measured. A model between the first and the last
            that a quantity leaves out is the last one in it.
        difference: from the model before to the model after, where it says something.
        notes: how it was measured.
        whole: what a bar of full length stands for; 0 for the largest figure shown.
        part: of a mixture of texts that it is of; empty for all of the text.
    """

    key: str
    label: str
    unit: str
    form: str
    values: Mapping[str, Value | None]
    difference: Difference | None = None
    notes: Sequence[str] = ()
    whole: float = 0.0
    part: str = ""

    @property
    def name(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def change(self) -> str:
        """The difference in words; empty for none."""
        return "" if self.difference is None else str(self.difference)

    @property
    def way(self) -> str:
        """From the first to the last figure, without errors."""
        return " → ".join(self.plain(model) for model in (next(iter(self.values)), self.last))

    @property
    def last(self) -> str:
        """The model of the last column."""
        return list(self.values)[-1]

    def text(self, model: str) -> str:
        """The figure of a model with its error; empty for a model that is left out."""
        if model not in self.values:
            return ""
        value = self.values[model]
        return "not measured" if value is None else value.text(self.form)

    def plain(self, model: str) -> str:
        """The figure of a model without its error."""
        value = self.values[model]
        return "not measured" if value is None else f"{value.figure:{self.form}}"


# Key, label, unit, form, and the number that one of the unit is.
_QUALITY = (
    ("perplexity", "perplexity", "", ".2f", 1.0),
    ("nll", "NLL", "nats/token", ".4f", 1.0),
    ("kl", "KL to the original", "nats/token", ".4f", 1.0),
)
_SIZE_AND_SPEED = (
    ("blocks", "blocks", "", ".0f", 1.0),
    ("parameters", "parameters", "million", ".2f", 1e6),
    ("bytes", "weights on disk", "MB", ".1f", 1e6),
    ("prefill_tokens_per_second", "prefill", "tokens/s", ".0f", 1.0),
    ("decode_tokens_per_second", "decode", "tokens/s", ".1f", 1.0),
    ("peak_memory_bytes", "peak memory", "MB", ".0f", 1e6),
)


def evaluation_rows(evaluation: Mapping[str, Any], *, last: str = "cut") -> list[Row]:
    """The table of the original, the exact cut and what was made of it.

    Size and speed are the same of all that have the same blocks, and shown of the last one.

    Args:
        evaluation: content of `evaluation.json`.
        last: what the last model is where that does not say so.
    """
    before = {**evaluation["before"], "kl": 0.0}
    after = {**evaluation["after"], "kl": evaluation["kl"], "kl_se": evaluation["kl_se"]}
    first, final = {"original": before}, {evaluation.get("last") or last: after}
    between = {name: evaluation[name] for name in ("cut", "patched") if evaluation.get(name)}
    rows = [_row(*told, {**first, **between, **final}) for told in _QUALITY]
    for name, part in evaluation.get("parts", {}).items():
        ways = {way: found["parts"][name] for way, found in between.items() if "parts" in found}
        rows += _of_part(name, evaluation_rows({**part, **ways}, last=next(iter(final))))
    return rows + [_row(*told, {**first, **final}) for told in _SIZE_AND_SPEED]


def healing_rows(healing: Mapping[str, Any]) -> list[Row]:
    """Quality of the original and of the cut model before and after healing.

    The models are ``original``, ``cut`` (``patched`` where it was that before), ``patched`` where
    a distillation followed the patch, and ``healed``.
    """
    perplexity, start = healing["before"]["original_perplexity"], healing_start(healing)
    models = {
        "original": {"perplexity": perplexity, "nll": math.log(perplexity or 1.0), "kl": 0.0},
        start: healing["before"],
    }
    patch = (healing.get("patch") or {}).get("scores")
    if patch and healing.get("steps"):
        models["patched"] = patch
    models["healed"] = healing["after"]
    rows = [_row(*told, models, first=start) for told in _QUALITY]
    for name in healing["after"].get("parts", {}):
        of_part = {key: found["parts"][name] for key, found in models.items() if "parts" in found}
        perplexity = of_part[start]["original_perplexity"]
        of_part = {"original": {"perplexity": perplexity, "kl": 0.0}, **of_part}
        rows += _of_part(name, [_row(*told, of_part, first=start) for told in _QUALITY])
    return rows


def healing_start(healing: Mapping[str, Any]) -> str:
    """What a healing was given: ``patched``, or ``cut``."""
    return "patched" if healing.get("start") == "patched" else "cut"


def _of_part(name: str, rows: Sequence[Row]) -> list[Row]:
    """Quality on one part of a mixture; NLL says what perplexity says."""
    return [
        replace(row, key=f"{name}: {row.key}", label=f"{name}: {row.label}", part=name)
        for row in rows
        if row.key in ("perplexity", "kl")
    ]


def _row(
    key: str,
    label: str,
    unit: str,
    form: str,
    scale: float,
    models: Mapping[str, Mapping[str, Any]],
    *,
    first: str = "original",
) -> Row:
    """A row whose difference is from ``first`` to the last model."""
    values = {name: _value(found, key, scale) for name, found in models.items()}
    a, b = values[first], list(values.values())[-1]
    if a is None or b is None:
        return Row(key, label, unit, form, dict.fromkeys(values))
    difference = None
    if key == "nll":
        difference = Difference(b.figure - a.figure)
    elif a.figure:
        difference = Difference(100 * (b.figure / a.figure - 1), percent=True)
    return Row(key, label, unit, form, values, difference)


def _value(found: Mapping[str, Any], key: str, scale: float) -> Value | None:
    figure, error = found.get(key), found.get(f"{key}_se")
    if figure is None:
        return None
    return Value(float(figure) / scale, None if error is None else float(error) / scale)


def patch_rows(patch: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """What was patched: blocks that are gone, the layer before them, tokens, held-out error left.

    Args:
        patch: of the record of a checkpoint.
    """
    rows = []
    for cut in (patch or {}).get("cuts", []):
        gone, left = cut.get("removed") or [cut["block"] + 1], cut.get("held_out_error_left")
        rows.append(
            (
                f"{gone[0]}" if gone[0] == gone[-1] else f"{gone[0]} to {gone[-1]}",
                f"block {cut['block']}, `{cut['layer']}`",
                str(cut.get("tokens", "")),
                "" if left is None else f"{100 * left:.0f} %",
            )
        )
    return rows


def benchmark_rows(found: Mapping[str, Any], *, last: str = "cut") -> list[Row]:
    """Benchmark tasks with the scores of both models, and their perplexity on WikiText-2.

    Bars of scores reach from 0 to 1. A difference within the noise is called so.

    Args:
        found: content of `benchmarks.json`.
        last: what the second model is, ``cut`` or ``healed``.
    """
    rows = []
    for r in found["rows"]:
        values = {
            name: Value(float(r[side]), r[f"{side}_se"])
            for name, side in (("original", "original"), (last, "cut"))
        }
        notes = [r["metric"], f"n = {r['n']}"]
        if r["shots"]:
            notes.append(f"{r['shots']} shots")
        notes.append(f"p = {r['p_value']:.3g}")
        if not r["more_than_noise"]:
            notes.append("within the noise")
        rows.append(
            Row(
                r["task"],
                r["task"],
                "",
                ".4f",
                values,
                Difference(r["difference"], low=r["difference_low"], high=r["difference_high"]),
                notes,
                max(1.0, *(v.figure for v in values.values())),
            )
        )
    text = found.get("wikitext2")
    if text is not None:
        models = {"original": text["original"], last: text["cut"]}
        row = _row("perplexity", "WikiText-2", "", ".2f", 1.0, models)
        notes = ["perplexity", f"{text['tokens']} tokens", f"KL {text['kl']:.4f} nats/token"]
        rows.append(replace(row, notes=notes))
    return rows
