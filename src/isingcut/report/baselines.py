"""Other methods' choices beside the run's own: losses, price and broken constraints, as rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isingcut.report.words import numbers, plus_minus


def sort_baselines(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The contents of `baseline-NAME.json` files, lowest measured KL first."""
    return sorted(found, key=lambda b: float(b["kl"]))


def baseline_rows(
    baselines: Sequence[Mapping[str, Any]],
    candidates: Mapping[str, Any] | None,
    energy: str,
    meta: Mapping[str, Any] | None,
    blocks: int,
) -> list[tuple[str, ...]]:
    """Method, blocks removed, KL, NLL, passes, tokens searched, broken rows; lowest KL first.

    Args:
        baselines: contents of `baseline-NAME.json`; without any there is no row.
        candidates: content of `candidates.json`, for the chosen state.
        energy: the name of the run's energy.
        meta: that of its Hamiltonian, for its price.
        blocks: N.
    """
    if not baselines:
        return []
    rows = [(float(b["kl"]), _row(b)) for b in baselines]
    if candidates is not None:
        chosen = candidates["chosen"]
        own = (
            f"**chosen** (`{energy}`)",
            numbers(chosen["removed"]),
            *_losses(chosen),
            energy_passes(meta, blocks),
            str((meta or {}).get("tokens", "unknown")),
            "none",
        )
        rows.append((float(chosen["kl"]), own))
    return [row for _, row in sorted(rows, key=lambda r: r[0])]


def baselines_won(
    baselines: Sequence[Mapping[str, Any]], candidates: Mapping[str, Any] | None
) -> list[str]:
    """Names of the methods that kept all constraints and have a lower KL than the chosen state."""
    if candidates is None:
        return []
    mine = float(candidates["chosen"]["kl"])
    return [b["baseline"] for b in baselines if float(b["kl"]) < mine and not b["violated"]]


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    method = ", ".join([f"`{found['baseline']}`", *found.get("settings", [])])
    blocks = numbers(found["removed"])
    if found.get("merges"):
        blocks += f", merged into {numbers([group[0] for group in found['merges']])}"
    return (
        method,
        blocks,
        *_losses(found),
        f"{found['passes']:.3g}",
        str(found["tokens_searched"]),
        ", ".join(found["violated"]) or "none",
    )


def _losses(found: Mapping[str, Any]) -> tuple[str, str]:
    return plus_minus(found["kl"], found["kl_se"]), plus_minus(found["nll"], found["nll_se"])


def energy_passes(meta: Mapping[str, Any] | None, blocks: int) -> str:
    """Full forward passes that the energy took, where it was counted."""
    meta = meta or {}
    if "passes" in meta:
        return f"{meta['passes']:.3g}"
    return f"{meta['blocks_run'] / blocks:.3g}" if "blocks_run" in meta else "not counted"
