"""Runs side by side in words and rows: what each is, what differs, and what may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.report.fidelity import correlation_text
from isingcut.report.run_files import RunFiles
from isingcut.report.states import measured_kl
from isingcut.report.words import listed, numbers


@dataclass(frozen=True)
class Side:
    """One run of a comparison.

    Attributes:
        files: its files.
        name: its folder, with the folder above where names are the same.
        tone: number of its colour.
    """

    files: RunFiles
    name: str
    tone: int

    @property
    def text(self) -> str | None:
        """SHA-256 of its calibration tokens; equal where losses were measured on the same text."""
        return self.files.calibration.get("sha256")

    @property
    def sha(self) -> str:
        """SHA-256 that identifies its model."""
        return str(self.files.run["provenance"]["model"]["sha256"])

    @property
    def loss(self) -> dict[str, Any] | None:
        """The chosen state as the ranking measured it."""
        found = self.files.candidates
        return None if found is None else found["chosen"]


def numbers_of(count: int) -> str:
    """A number of runs in words."""
    return f"{count} run{'s' * (count != 1)}"


def named(found: Sequence[RunFiles]) -> list[Side]:
    places = [f.target.resolve() for f in found]
    short = [p.name for p in places]
    long = [f"{p.parent.name}/{p.name}" for p in places]
    names = [s if short.count(s) == 1 else n for s, n in zip(short, long, strict=True)]
    names = [n if names.count(n) == 1 else f"{n} ({k + 1})" for k, n in enumerate(names)]
    return [Side(f, n, k % 6) for k, (f, n) in enumerate(zip(found, names, strict=True))]


def differences(runs: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Model, text and every option that is not the same in all runs."""
    rows = [
        ("model", [r.files.model for r in runs], [r.sha for r in runs]),
        (
            "calibration text",
            [
                f"{r.files.calibration.get('source', '')} (SHA-256 {(r.text or 'not there')[:8]})"
                for r in runs
            ],
            [str(r.text) for r in runs],
        ),
    ]
    keys = list(dict.fromkeys(k for r in runs for k in r.files.run["config"]))
    for key in keys:
        values = [str(r.files.run["config"].get(key, "")) for r in runs]
        if key not in ("model", "calibration"):
            rows.append((key.replace("_", " "), values, values))
    return [(name, shown) for name, shown, told in rows if len(set(told)) > 1]


def comparison_warnings(runs: Sequence[Side]) -> list[str]:
    said = []
    if len({r.sha for r in runs}) > 1:
        said.append(
            "The runs are of different models: a KL says how far each cut is from its own original."
        )
    if len({r.text for r in runs}) > 1:
        said.append(
            "The runs were measured on different tokens, so their losses are not directly "
            "comparable; give them the same --calibration, --length, --rank-samples and --seed "
            "to compare energies alone."
        )
    counts = {len(r.files.removed) for r in runs if r.files.removed is not None}
    if len(counts) > 1:
        sizes = numbers(sorted(counts))
        said.append(f"They remove different numbers of blocks: {sizes}. See the trade-offs below.")
    absent = [r.name for r in runs if r.loss is None]
    if absent:
        said.append(
            f"Not ranked, so without losses: {', '.join(absent)}. Type isingcut rank for them."
        )
    said += [f"{r.name}: {w}" for r in runs for w in r.files.warnings]
    return said


def overview(runs: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """What each run is and came to: names and one text per run."""
    columns = [_column(run) for run in runs]
    return [(name, [column[name] or "not run" for column in columns]) for name in columns[0]]


def _column(run: Side) -> dict[str, str]:
    """What one run is and came to; empty where a stage was not run."""
    files, found = run.files, run.files.candidates
    scores = {row.key: row for row in files.scores}
    fidelity = {} if found is None else found["fidelity"]["kl"]

    def correlation(name: str) -> str:
        return correlation_text(fidelity, name) if fidelity else ""

    def changed(key: str) -> str:
        row = scores.get(key)
        if row is None:
            return ""
        return f"{row.way} ({row.change})" if row.change else row.text(row.last)

    chosen = None if found is None else found["chosen"]
    return {
        "model": files.model,
        "energy": f"`{files.energy}`",
        "calibration": files.calibration.get("source", ""),
        "blocks": str(len(files.blocks)),
        "removed": "" if files.removed is None else listed(files.removed),
        "chosen": "" if chosen is None else f"state {chosen['position']}, {chosen['why']}",
        "Spearman": correlation("spearman"),
        "Kendall": correlation("kendall"),
        "KL, ranking text": "" if chosen is None else measured_kl(chosen).text(),
        "KL, unseen text": scores["kl"].text(scores["kl"].last) if scores else "",
        "perplexity": changed("perplexity"),
        "parameters, million": changed("parameters"),
        "decode, tokens/s": changed("decode_tokens_per_second"),
    }
