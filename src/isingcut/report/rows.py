"""The figures of several models as typed rows; terminal, pages and card only lay them out.

evaluation.json, healing.json, benchmarks.json -> rows, one a quantity -> cells, bars, sentences
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isingcut.files import evaluations, healings, states

Figures = Mapping[str, Any]
"""The figures of one model by their keys, each with its error under ``KEY_se``."""


RANKING, UNSEEN = "ranking text", "unseen text"
"""The texts that figures are measured on: what chose the state, and what nothing was chosen on."""


def label_figure(quantity: str, model: str, text: str) -> str:
    """The name of a figure, with the model and the text that it was measured on."""
    return f"{quantity} ({model}, {text})"


CUT_RANKING = f"cut, {RANKING}"
"""How the states of a ranking are measured: as exact cuts, on the text that chooses."""


def plus_minus(figure: float, error: float | None, form: str = ".4f") -> str:
    """A figure with its standard error, where there is one."""
    return f"{figure:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


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
        error: its standard error, where the models were compared sample by sample.
        low, high: ends of its 95 % interval, where the models were compared in pairs.
    """

    figure: float
    percent: bool = False
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.percent:
            return f"{plus_minus(self.figure, self.error, '+.1f')} %"
        interval = "" if self.low is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        return plus_minus(self.figure, self.error, "+.4f") + interval


@dataclass(frozen=True)
class Row:
    """One quantity of several models.

    Attributes:
        key: what the results file calls it.
        label: what people call it.
        unit: of the figures; empty for none.
        form: how the figures are written.
        values: by model (``original``, ``cut``, ``patched``, ``healed``, and ``gguf`` for the last
            one as a GGUF file), in the order of the
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
        """The final model."""
        return _final(self.values)

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


def _final(models: Mapping[str, Any]) -> str:
    return [name for name in models if name != "gguf"][-1]


# Key, label, unit, form, and the number that one of the unit is.
_QUALITY = (
    ("perplexity", "perplexity", "", ".2f", 1.0),
    ("nll", "NLL", "nats/token", ".4f", 1.0),
    ("kl", "KL to the original", "nats/token", ".4f", 1.0),
    ("draft_acceptance", "MTP drafts accepted", "%", ".1f", 0.01),
)
_SIZE_AND_SPEED = (
    ("blocks", "blocks", "", ".0f", 1.0),
    ("parameters", "parameters", "million", ".2f", 1e6),
    ("bytes", "weights on disk", "MB", ".1f", 1e6),
    ("prefill_tokens_per_second", "prefill", "tokens/s", ".0f", 1.0),
    ("decode_tokens_per_second", "decode", "tokens/s", ".1f", 1.0),
    ("peak_memory_bytes", "peak memory", "MB", ".0f", 1e6),
)


def evaluation_rows(evaluation: evaluations.EvaluationFile, *, last: str = "cut") -> list[Row]:
    """The table of the original, the exact cut and what was made of it.

    Size and speed are the same of all that have the same blocks, and shown of the last one.

    Args:
        last: what the last model is where the file does not say so.
    """
    last, packed = evaluation.last or last, evaluation.gguf
    between = {
        name: found for name in ("cut", "patched") if (found := getattr(evaluation, name, None))
    }
    rows = _quality_rows(_collect(evaluation, between, last, packed))
    for name, part in evaluation.parts.items():
        ways = {way: found.parts[name] for way, found in between.items() if name in found.parts}
        rows += _rows_of_part(name, _collect(part, ways, last, packed and packed.parts[name]))
    for name, text in evaluation.elsewhere.items():
        ways = {k: of[name] for k, found in between.items() if name in (of := found.elsewhere)}
        models = _collect(text, ways, last, packed and packed.elsewhere[name])
        rows += _rows_of_part(f"{name} (not calibrated on)", models)
    sizes: dict[str, Figures] = {"original": dict(evaluation.before), last: dict(evaluation.after)}
    if packed:
        sizes["gguf"] = {"bytes": packed.bytes}
    return rows + [_row(*quantity, sizes) for quantity in _SIZE_AND_SPEED]


def _collect(
    found: evaluations.EvaluationFile | evaluations.PartScores,
    between: Mapping[str, evaluations.Perplexity],
    last: str,
    packed: evaluations.Perplexity | None,
) -> dict[str, Figures]:
    return {
        "original": {**dict(found.before), "kl": 0.0},
        **{name: dict(model) for name, model in between.items()},
        last: {
            **dict(found.after),
            "kl": found.kl,
            "kl_se": found.kl_se,
            "change_se": found.nll_change_se,
        },
        **({} if packed is None else {"gguf": dict(packed)}),
    }


def healing_rows(healing: healings.HealingFile) -> list[Row]:
    """Quality of the original and of the cut model before and after healing.

    The models are ``original``, ``cut`` (``patched`` where it was that before), ``patched`` where
    a distillation followed the patch, and ``healed``.
    """
    start = healing_start(healing)
    models = {start: healing.before}
    if healing.patch is not None and healing.patch.scores is not None and healing.steps:
        models["patched"] = healing.patch.scores
    models["healed"] = healing.after
    rows = _quality_rows(_collect_healed(models), start)
    for name in healing.after.parts:
        of_part = {key: found.parts[name] for key, found in models.items() if name in found.parts}
        rows += _rows_of_part(name, _collect_healed(of_part), start)
    return rows


def _collect_healed(models: Mapping[str, Any]) -> dict[str, Figures]:
    perplexity = next(iter(models.values())).original_perplexity
    original = {"perplexity": perplexity, "nll": math.log(perplexity or 1.0), "kl": 0.0}
    return {"original": original, **{name: dict(found) for name, found in models.items()}}


def healing_start(healing: healings.HealingFile) -> str:
    """What a healing was given: ``patched``, or ``cut``."""
    return "patched" if healing.start == "patched" else "cut"


def _quality_rows(models: Mapping[str, Figures], first: str = "original") -> list[Row]:
    rows = [_row(*quantity, models, first=first) for quantity in _QUALITY]
    # Few models draft tokens.
    return [row for row in rows if row.key != "draft_acceptance" or any(row.values.values())]


def _rows_of_part(name: str, models: Mapping[str, Figures], first: str = "original") -> list[Row]:
    """Quality on one part of a mixture; NLL says what perplexity says."""
    return [
        replace(row, key=f"{name}: {row.key}", label=f"{name}: {row.label}", part=name)
        for row in _quality_rows(models, first)
        if row.key != "nll"
    ]


def _row(
    key: str,
    label: str,
    unit: str,
    form: str,
    scale: float,
    models: Mapping[str, Figures],
    *,
    first: str = "original",
) -> Row:
    """A row whose difference is from ``first`` to the final model."""
    final = _final(models)
    values = {
        name: _value(found, key, scale)
        for name, found in models.items()
        if name != "gguf" or key in found
    }
    a, b = values[first], values[final]
    if a is None or b is None:
        return Row(key, label, unit, form, dict.fromkeys(values))
    difference, error = None, models[final].get("change_se")
    if first != "original":
        # Both were compared with the original, and not with each other sample by sample.
        return Row(key, label, unit, form, values)
    if key == "nll":
        difference = Difference(b.figure - a.figure, error=error)
    elif a.figure:
        ratio = b.figure / a.figure
        error = 100 * ratio * error if key == "perplexity" and error is not None else None
        difference = Difference(100 * (ratio - 1), percent=True, error=error)
    return Row(key, label, unit, form, values, difference)


def _value(found: Figures, key: str, scale: float) -> Value | None:
    figure, error = found.get(key), found.get(f"{key}_se")
    if figure is None:
        return None
    return Value(figure / scale, None if error is None else error / scale)


def kl_of(row: states.MeasuredLoss | states.BaselineFile) -> Value:
    """The measured KL of a state."""
    return Value(row.kl, row.kl_se)


def benchmark_rows(found: evaluations.BenchmarksFile, *, last: str = "cut") -> list[Row]:
    """Benchmark tasks with the scores of both models, and their perplexity on WikiText-2.

    Bars of scores reach from 0 to 1. A difference within the noise is called so.

    Args:
        last: what the second model is, ``cut`` or ``healed``.
    """
    rows = []
    for r in found.rows:
        values = {"original": Value(r.original, r.original_se), last: Value(r.cut, r.cut_se)}
        notes = [r.metric, f"n = {r.n}", *([f"{r.shots} shots"] if r.shots else [])]
        notes += [f"p = {r.p_value:.3g}", *([] if r.more_than_noise else ["within the noise"])]
        difference = Difference(r.difference, low=r.difference_low, high=r.difference_high)
        whole = max(1.0, *(v.figure for v in values.values()))
        rows.append(Row(r.task, r.task, "", ".4f", values, difference, notes, whole))
    if (text := found.wikitext2) is not None:
        cut = {**dict(text.cut), "change_se": text.nll_change_se}
        models = {"original": dict(text.original), last: cut}
        row = _row("perplexity", "WikiText-2", "", ".2f", 1.0, models)
        notes = ["perplexity", f"{text.tokens} tokens", f"KL {text.kl:.4f} nats/token"]
        rows.append(replace(row, notes=notes))
    return rows
