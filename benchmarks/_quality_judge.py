"""Judge every distinct chosen state on every judged text: per-sample KL and NLL.

States of one call share their prefixes. A later call judges only what has been chosen since.
A merged model is no state of the original's blocks and is judged apart, with the merge applied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from _merging import measure_merged
from _quality_bench import Bench
from _quality_store import Part, Price
from isingcut.files.writing import fingerprint
from isingcut.ising.states import Floats, states_of
from isingcut.measure.losses import measure

EXPECTED_DISTINCT = 0.6
"""Share of the choices still missing that is expected to be a state not seen before."""


@dataclass(frozen=True)
class Chosen:
    """What a method made of the model: blocks gone and, if any, what was merged."""

    removed: tuple[int, ...]
    merges: Any = None

    @property
    def key(self) -> str:
        text = ",".join(map(str, self.removed))
        return text if self.merges is None else f"{text} merged {fingerprint(self.merges)}"


@dataclass(frozen=True, eq=False)
class Judged:
    """Per-sample sums over one text, by the key of what was judged."""

    kl: dict[str, Floats]
    nll: dict[str, Floats]
    original_nll: Floats
    counts: npt.NDArray[np.int64]


def rows_chosen(bench: Bench) -> list[dict[str, Any]]:
    """Every choice of every finished part, with the text it was made on and its `Chosen`."""
    rows = []
    for _, part in bench.store.under("choose"):
        for row in part["choices"]:
            chosen = Chosen(tuple(row["removed"]), row.get("merges"))
            rows.append({**row, "text": part["text"], "chosen": chosen})
    return rows


def traced(bench: Bench, most: int = 8) -> list[Chosen]:
    """States on the traces of the long searches, thinned to ``most`` each, the last kept."""
    found = []
    for _, part in bench.store.under("large"):
        found += [Chosen(tuple(step["removed"])) for step in thinned(part["trace"], most)]
    return found


def thinned(trace: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many steps of a trace, evenly spaced in their order, with both ends."""
    if len(trace) <= most:
        return trace
    picks = np.unique(np.linspace(0, len(trace) - 1, most).round().astype(int))
    return [trace[i] for i in picks]


def judging(bench: Bench) -> list[Part]:
    """One part for each text and for what has been chosen and not yet judged there."""
    everything = [r["chosen"] for r in rows_chosen(bench)] + traced(bench)
    parts = []
    for text in bench.judged_on:
        seen = set(_keys(bench, text))
        fresh = {c.key: c for c in everything if c.key not in seen}
        if fresh:
            parts.append(_part(bench, text, [fresh[k] for k in sorted(fresh)]))
    return parts


def expected(bench: Bench, choices: int) -> list[Price]:
    """The price of judging so many choices that are still to be made."""
    states = EXPECTED_DISTINCT * choices
    passes = states * 0.4 + 1
    tokens = bench.options.judged_tokens * len(bench.judged_on)
    return [Price(tokens, passes, states + 1)] if choices else []


def _part(bench: Bench, text: str, chosen: list[Chosen]) -> Part:
    states = [c for c in chosen if c.merges is None]
    merged = [c for c in chosen if c.merges is not None]
    name = f"judge/{text}/{fingerprint([c.key for c in chosen])}"

    def make(journal: Path) -> dict[str, Any]:
        tokens, work = bench.judged(text), bench.work(journal)
        found = measure(
            bench.replay,
            tokens,
            states_of(bench.n, [c.removed for c in states]),
            batch_tokens=work.batch_tokens,
            progress=work.progress,
            description=f"judging {len(states)} states on {text}",
            journal=journal,
        )
        rows = [
            _row(c, kl, nll)
            for c, kl, nll in zip(states, found.kl_sums, found.nll_sums, strict=True)
        ]
        for c in merged:
            own = measure_merged(
                bench.replay,
                tokens,
                c.merges,
                batch_tokens=work.batch_tokens,
                progress=work.progress,
            )
            assert np.flatnonzero(own.states[0]).tolist() == list(c.removed)
            rows.append(_row(c, own.kl_sums[0], own.nll_sums[0]))
        return {
            "text": text,
            "counts": found.counts.tolist(),
            "original_nll_sums": _short(found.original_nll_sums),
            "states": rows,
        }

    tokens = bench.judged(text).tokens
    each = sum(bench.n - len(c.removed) for c in states) / bench.n * 0.6
    price = Price(tokens, 1 + each + 2 * len(merged), 1 + len(states) + 2 * len(merged))
    return Part(name, make, (price,))


def _row(chosen: Chosen, kl: Floats, nll: Floats) -> dict[str, Any]:
    return {"key": chosen.key, "kl_sums": _short(kl), "nll_sums": _short(nll)}


def _short(values: Iterable[float]) -> list[float]:
    return [round(float(v), 5) for v in values]


def _keys(bench: Bench, text: str) -> list[str]:
    return [row["key"] for _, part in bench.store.under(f"judge/{text}") for row in part["states"]]


def load_judged(bench: Bench, text: str) -> Judged | None:
    """Everything judged on a text so far; None where nothing was."""
    parts = [part for _, part in bench.store.under(f"judge/{text}")]
    if not parts:
        return None
    rows = {row["key"]: row for part in parts for row in part["states"]}
    return Judged(
        {key: np.array(row["kl_sums"]) for key, row in rows.items()},
        {key: np.array(row["nll_sums"]) for key, row in rows.items()},
        np.array(parts[0]["original_nll_sums"]),
        np.array(parts[0]["counts"], dtype=np.int64),
    )
