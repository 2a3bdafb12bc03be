"""The figures of several models as typed rows, which terminal, pages and card display.

evaluation.json, healing.json, benchmarks.json -> rows, one per quantity -> cells, bars, sentences
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from isingcut.files import evaluations, healings, states

Figures = Mapping[str, Any]
"""Figures of one model by their keys; the error of ``KEY`` is under ``KEY_se``."""


CUT_RANKING = "cut, ranking text"
"""Label of the figures of a ranking: exact cuts, measured on the ranking text."""


# The studies support these bounds (docs/experiments/). Quantised to 4 to 6 bits, SmolLM2-135M has a
# KL of 0.06 to 0.09 (frontier.md). Of the right answers above chance are lost, at a KL of
# - 0.15 to 0.28: a quarter; of 27 word problems solved in steps, 3 to 5 are left (coder, M = 4);
# - 0.4 to 0.6: a fifth to a half (coder, M = 7; objectives.md; healing.md, healed);
# - 0.6 to 1.2: a third to two thirds (objectives.md, 44 states; healing.md, cut);
# - above: a half to all (objectives.md; healing.md, 9 removed).
# At a KL of 0.3 a model may lose most of its answers and most of the instructions that it followed
# (answers.md), so they have bounds of their own, from the table in docs/loss.md.
_POOR = "do not deploy this as a chat model: "
BANDS = (
    (0.1, 0.2, "expect nearly the same answers"),
    (0.3, 0.4, "expect answers of the same kind; details and arithmetic suffer"),
    (0.6, 0.6, "expect fluent text with many mistakes"),
    (
        1.2,
        math.inf,
        f"{_POOR}it is often wrong, repeats itself or does not end; heal it, or cut less",
    ),
    (math.inf, math.inf, f"{_POOR}its text breaks down; cut less, or heal it"),
)
"""What to expect of a model, by two bounds: of its KL to the original in nats per token, and of the
share that its answers have lost (`RunFiles.lost`). docs/loss.md has the same table."""


def judge(kl: float, lost: float = 0.0) -> str:
    """Return in words what to expect of a model with this KL, whose answers lost this share."""
    found = (words for top, most, words in BANDS if kl < top and lost < most)
    return next(found, BANDS[-1][-1])


def plus_minus(figure: float, error: float | None, form: str = ".4f") -> str:
    """Format a figure with its standard error, if it has one."""
    return f"{figure:{form}}" + (
        "" if error is None else f" ± {error:{form.lstrip('+')}}"
    )


@dataclass(frozen=True)
class Value:
    """A figure with its standard error, None if unknown."""

    figure: float
    error: float | None = None

    @property
    def low(self) -> float:
        """The figure minus its standard error."""
        return self.figure - (self.error or 0.0)

    @property
    def high(self) -> float:
        """The figure plus its standard error."""
        return self.figure + (self.error or 0.0)

    def text(self, form: str = ".4f") -> str:
        """Format the figure with its error; a zero without an error is ``0``."""
        if self.figure == 0 and self.error is None:
            return "0"
        return plus_minus(self.figure, self.error, form)


@dataclass(frozen=True)
class Row:
    """One quantity of several models.

    Attributes:
        key: key in the results file.
        label: display name.
        unit: unit of the figures; empty for none.
        form: format specification of the figures.
        values: figures by model (``original``, ``cut``, ``patched``, ``healed``, and ``gguf`` for
            the final one as a GGUF file), in the order of the columns; None if a model was not
            measured. A model between the first and the last without an entry has the figure of
            the last.
        change: difference between the first compared model and the final one as text, in percent or
            in the row's unit; with its standard error if the models were compared sample by sample
            or timed repeatedly. Empty for none.
        ratio: figure of the final model divided by that of the first, for a change in percent.
        notes: details of the measurement.
        whole: figure of a bar of full length; 0 for the largest figure shown.
        part: name of the measured part of a mixture, or other text; empty for the whole text.
    """

    key: str
    label: str
    unit: str
    form: str
    values: Mapping[str, Value | None]
    change: str = ""
    ratio: Value | None = None
    notes: Sequence[str] = ()
    whole: float = 0.0
    part: str = ""

    @property
    def name(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def way(self) -> str:
        """The first and the last figure as text, without errors."""
        return " → ".join(
            self.plain(model) for model in (next(iter(self.values)), self.last)
        )

    @property
    def last(self) -> str:
        """Name of the final model."""
        return _final(self.values, self.key)

    def text(self, model: str) -> str:
        """Format the figure of a model with its error; empty for a model without an entry."""
        if model not in self.values:
            return ""
        value = self.values[model]
        return "not measured" if value is None else value.text(self.form)

    def plain(self, model: str) -> str:
        """Format the figure of a model without its error."""
        value = self.values[model]
        return "not measured" if value is None else f"{value.figure:{self.form}}"


def _final(models: Mapping[str, Any], key: str) -> str:
    # A GGUF file was given, so the cut GGUF file is compared with it. The checkpoint is unpacked.
    return [name for name in models if name != "gguf" or key == "bytes"][-1]


class Quantity(NamedTuple):
    """A quantity of a row, by its key in the figures, with the value of one unit."""

    key: str
    label: str
    unit: str
    form: str
    one: float = 1.0


_QUALITY = (
    Quantity("perplexity", "perplexity", "", ".2f"),
    Quantity("nll", "NLL", "nats/token", ".4f"),
    Quantity("kl", "KL to the original", "nats/token", ".4f"),
)
_SIZE_AND_SPEED = (
    Quantity("blocks", "blocks", "", ".0f"),
    Quantity("parameters", "parameters", "million", ".2f", 1e6),
    Quantity("bytes", "weights on disk", "MB", ".1f", 1e6),
    Quantity("prefill_tokens_per_second", "prefill", "tokens/s", ".0f"),
    Quantity("decode_tokens_per_second", "decode", "tokens/s", ".1f"),
)


def evaluation_rows(
    evaluation: evaluations.EvaluationFile,
    endings: evaluations.Endings | None = None,
) -> list[Row]:
    """Return the rows of the original, the exact cut and the models made from it.

    Models with the same blocks have the same size and speed, which only the last one lists.

    Args:
        endings: of the generated answers; by default of those to the fixed prompts.
    """
    last = evaluation.last or "GGUF"
    others = {
        name: model
        for name in ("cut", "patched", "gguf")
        if (model := getattr(evaluation, name))
    }
    rows = _quality_rows(_collect(evaluation, others, last))
    for of, suffix in (("parts", ""), ("elsewhere", " (not calibrated on)")):
        for part, scores in getattr(evaluation, of).items():
            same = {
                name: getattr(model, of)[part]
                for name, model in others.items()
                if part in getattr(model, of)
            }
            rows += _quality_rows(_collect(scores, same, last), part=part + suffix)
    if endings := endings or evaluation.answers:
        rows += answer_rows(endings, last)
    sizes: dict[str, Figures] = {
        "original": dict(evaluation.before),
        last: dict(evaluation.after),
    }
    for key, shown in evaluation.metrics.items():
        rows.append(_row(Quantity(key, key, shown.unit, shown.form), sizes))
    if evaluation.gguf:
        sizes["gguf"] = {"bytes": evaluation.gguf.bytes}
    return rows + [_row(quantity, sizes) for quantity in _SIZE_AND_SPEED]


_ANSWERS = (
    ("answered", "prompts answered as the original could", "%", ".0f", 100.0),
    ("ended", "answers that end", "%", ".0f", 100.0),
    ("repeated", "repeated sequences of 4 tokens", "%", ".1f", 100.0),
    ("tokens", "answer length", "tokens", ".0f", 1.0),
)


def answer_rows(answers: evaluations.Endings, last: str) -> list[Row]:
    """Return the means over the generated answers of both models.

    The change has its paired standard error; on a few prompts alone it is no statistic.
    """
    rows = []

    for key, label, unit, form, scale in _ANSWERS:
        if not answers.values("after", key):
            continue
        before, after = (
            scale * answers.mean(side, key) for side in ("before", "after")
        )
        error = answers.error(key)
        change = plus_minus(after - before, error and scale * error, f"+{form}")
        values = {"original": Value(before), last: Value(after)}
        of = answers.rated if key == "answered" else answers.pairs
        notes = [f"n = {len(of)}"] * (key in ("answered", "ended"))
        row = Row(f"answers_{key}", label, unit, form, values, change, notes=notes)
        rows.append(row)
    return rows


def _collect(
    scores: evaluations.PairScores,
    others: Mapping[str, evaluations.Perplexity],
    last: str,
) -> dict[str, Figures]:
    """Return the figures of the original, of the models before the last, of it and of the GGUF."""
    known: dict[str, Figures] = {name: dict(model) for name, model in others.items()}
    # The scores hold the KL of the last model.
    known[last] = dict(scores.after) | dict(scores)
    known["original"] = dict(scores.before) | {"kl": 0.0}
    order = ("original", "cut", "patched", last, "gguf")
    return {name: known[name] for name in dict.fromkeys(order) if name in known}


def healing_rows(healing: healings.HealingFile) -> list[Row]:
    """Return the quality of the original and of the cut model before and after healing.

    The models are ``original``, ``cut`` (``patched`` if it was patched before the healing),
    ``patched`` if the healing itself patched and then distilled it, and ``healed``.
    """
    start = healing_start(healing)
    models = {start: healing.before}
    if healing.patch is not None and healing.patch.scores is not None and healing.steps:
        models["patched"] = healing.patch.scores
    models["healed"] = healing.after
    rows = _quality_rows(_collect_healed(models), start)
    for part in healing.after.parts:
        same = {n: m.parts[part] for n, m in models.items() if part in m.parts}
        rows += _quality_rows(_collect_healed(same), start, part)
    return rows


def _collect_healed(models: Mapping[str, Any]) -> Mapping[str, Figures]:
    perplexity = next(iter(models.values())).original_perplexity
    original = {"perplexity": perplexity, "nll": math.log(perplexity or 1.0), "kl": 0.0}
    return {"original": original} | {name: dict(m) for name, m in models.items()}


def healing_start(healing: healings.HealingFile) -> str:
    """Return the name of the model that a healing started from: ``patched`` or ``cut``."""
    return "patched" if healing.start == "patched" else "cut"


def _quality_rows(
    models: Mapping[str, Figures], first: str = "original", part: str = ""
) -> list[Row]:
    """Return the quality; on one part of a mixture without the NLL (perplexity is equivalent)."""
    rows = [_row(quantity, models, first) for quantity in _QUALITY]
    if not part:
        return rows
    return [
        replace(row, key=f"{part}: {row.key}", label=f"{part}: {row.label}", part=part)
        for row in rows
        if row.key != "nll"
    ]


def _row(
    quantity: Quantity, models: Mapping[str, Figures], first: str = "original"
) -> Row:
    """Make a row, with the change from the model ``first`` to the final one if it is known."""
    key = quantity.key
    names = quantity[:4]
    final = _final(models, key)
    values = {
        name: _value(figures, quantity)
        for name, figures in models.items()
        if name != "gguf" or key in figures
    }
    a = values[first]
    b = values[final]
    if a is None or b is None:
        return Row(*names, dict.fromkeys(values))
    notes = ["change: GGUF file"] * (final == "gguf")
    row = Row(*names, values, notes=notes)
    error = models[final].get("kl_change_se" if key == "kl" else "nll_change_se")
    if first != "original":
        if error is None:
            return row
        natural = (
            math.log(b.figure / a.figure)
            if key == "perplexity"
            else b.figure - a.figure
        )
        row = replace(row, notes=["within the noise"] * (abs(natural) <= 2 * error))
    if not a.figure:
        return row
    if key in ("nll", "kl"):
        return replace(row, change=plus_minus(b.figure - a.figure, error, "+.4f"))
    spread = error if key == "perplexity" else None
    if key.endswith("_per_second") and a.error is not None and b.error is not None:
        # The models were timed one after the other, with independent errors.
        spread = math.hypot(a.error / a.figure, b.error / b.figure)
    ratio = b.figure / a.figure
    spread = spread and ratio * spread
    change = plus_minus(100 * (ratio - 1), spread and 100 * spread, "+.1f")
    return replace(row, change=f"{change} %", ratio=Value(ratio, spread))


def _value(figures: Figures, quantity: Quantity) -> Value | None:
    figure = figures.get(quantity.key)
    error = figures.get(f"{quantity.key}_se")
    if figure is None:
        return None
    return Value(figure / quantity.one, error and error / quantity.one)


def kl_of(row: states.MeasuredLoss | evaluations.PairScores) -> Value:
    """Return the measured KL of a state or model."""
    return Value(row.kl, row.kl_se)


def flip_rows(benchmarks: evaluations.BenchmarksFile) -> list[list[str]]:
    """Return cells on the changed answers of each task, headings first; percents as intervals."""
    cells = [
        [
            "task",
            "changed, %",
            "right to wrong, %",
            "wrong to right, %",
            "kept above chance, %",
            "KL of choices, nats",
        ]
    ]
    for row in benchmarks.rows:
        if (flips := row.flips) is not None:
            lost = flips.right_to_wrong
            figures = (flips.changed, lost, flips.wrong_to_right, flips.kept)
            kl = "–" if flips.choice_kl is None else f"{flips.choice_kl:.4f}"
            cells.append([row.task, *map(_percent, figures), kl])
    return cells


def _percent(figure: evaluations.Percent | None) -> str:
    if figure is None:
        return "–"
    ends = (figure.low, figure.high)
    low, high = ("unbounded" if end is None else f"{end:.1f}" for end in ends)
    return f"{figure.percent:.1f} ({low} to {high})"


def benchmark_rows(
    benchmarks: evaluations.BenchmarksFile, *, last: str = "cut"
) -> list[Row]:
    """Return the scores of both models on benchmark tasks.

    Bars of scores range from 0 to 1. A difference within the noise has a note.

    Args:
        last: name of the second model: ``cut``, ``patched`` or ``healed``.
    """
    rows = []
    for r in benchmarks.rows:
        values = {
            "original": Value(r.original, r.original_se),
            last: Value(r.cut, r.cut_se),
        }
        notes = [r.metric, f"n = {r.n}"]
        notes += [f"{r.shots} shots"] * bool(r.shots)
        notes += [f"p = {r.p_value:.3g}"]
        notes += ["within the noise"] * (not r.more_than_noise)
        flips = r.flips
        if flips is not None and flips.choice_kl is not None:
            low = flips.kept and flips.kept.low
            notes += ["at chance level"] * ((low or 0.0) <= 0)
        interval = f"({r.difference_low:+.3f} to {r.difference_high:+.3f})"
        change = f"{r.difference:+.4f} {interval}"
        whole = max(1.0, r.original, r.cut)
        rows.append(Row(r.task, r.task, "", ".4f", values, change, None, notes, whole))
    return rows
