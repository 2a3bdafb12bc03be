"""Conformance of architectures: every family cut, reloaded and compared, on tiny random models.

For one family: its blocks are found (also on the meta device), replayed blocks give a forward
pass, gate gradients agree with autograd and with finite differences, and several random legal
states, with the first and the last block among them, are cut at the checkpoint, reloaded with
plain transformers and compared with the original with those blocks skipped.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from isingcut.errors import ArchitectureError, VerificationError
from isingcut.ising.states import blocks_of
from isingcut.models.architectures import BlockStack, find_stack, legality, skipped, stack_modules
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.verify import random_tokens, relative_difference, verify
from isingcut.models.loading import quiet_transformers
from isingcut.models.replay import Replay
from isingcut.testing.configurations import FAMILIES
from isingcut.testing.gates import check_gates, every_expert
from isingcut.testing.tiny import tiny_checkpoint, tiny_config, tiny_model

_TOLERANCE = 1e-5
# As many as the sliding windows of the tiny models are wide.
_NEW_TOKENS = 8


@dataclass(frozen=True)
class FamilyReport:
    """What became of one family.

    Args:
        family: a key of `FAMILIES`.
        outcome: ``"passed"``, ``"refused"`` or ``"failed"``.
        kinds: block kinds, with their counts.
        rows: legality rows, in words.
        states: states cut and compared.
        difference: largest relative logit difference seen.
        sublayer: whether the sublayer gate works (else only the block gate does).
        reason: why it was refused or failed.
    """

    family: str
    outcome: str
    kinds: str = ""
    rows: str = ""
    states: int = 0
    difference: float = 0.0
    sublayer: bool = True
    reason: str = ""


def check_family(
    family: str, folder: Path, *, states: int = 6, seed: int = 0, **changes: Any
) -> FamilyReport:
    """Run all checks of one family.

    Args:
        family: a key of `FAMILIES`.
        folder: an empty folder to write checkpoints to.
        states: how many legal states are cut.
        seed: of the weights, tokens and states.
        changes: configuration fields to set.
    """
    try:
        return _check(family, folder, states, seed, changes)
    except ArchitectureError as error:
        return FamilyReport(family, "refused", reason=str(error))
    except (AssertionError, RuntimeError, VerificationError) as error:
        return FamilyReport(family, "failed", reason=f"{type(error).__name__}: {error}")


def _check(
    family: str, folder: Path, states: int, seed: int, changes: dict[str, Any]
) -> FamilyReport:
    source = tiny_checkpoint(family, folder / "source", seed=seed, **changes)
    model = tiny_model(family, seed=seed, **changes)
    stop_rescaling(model)
    stack = find_stack(model)
    rows = legality(model.config, stack)
    _same_on_meta(family, stack, changes)
    tokens = random_tokens(model, 2, 20, seed)
    chosen = legal_states(stack, rows, states, seed)
    worst, sublayer, reason = 0.0, True, ""
    try:
        worst = _replay_is_forward(model, stack, tokens, chosen)
        smooth = tiny_model(family, seed=seed, **{**changes, **every_expert(model)})
        sublayer = check_gates(smooth.requires_grad_(False), stack, tokens)
    except ArchitectureError as error:
        reason = f"cuts exactly at given blocks, but is not measured: {error}"
    for number, removed in enumerate(chosen):
        out = folder / f"cut{number}"
        excise(source, removed, out, max_shard_bytes=60_000)
        worst = max(worst, verify(model, removed, out, new_tokens=_NEW_TOKENS))
    return FamilyReport(
        family,
        "refused" if reason else "passed",
        kinds=_counted(stack.kinds),
        rows=_rows_in_words(rows),
        states=len(chosen),
        difference=worst,
        sublayer=sublayer,
        reason=reason,
    )


def legal_states(stack: BlockStack, rows: Sequence[Any], wanted: int, seed: int) -> list[list[int]]:
    """Different legal states: with the first block, the last, both, and random ones.

    Raises:
        ArchitectureError: the legality rows leave no state but the original.
    """
    n = len(stack)
    numbers = np.arange(1, 2**n)
    bits: NDArray[np.bool_] = (numbers[:, None] >> np.arange(n)) & 1 > 0
    bits = bits[bits.sum(1) < n]
    for row in rows:
        bits = bits[row.satisfied(bits)]
    if len(bits) == 0:
        raise ArchitectureError("no state is legal: every block has to stay")
    bits = bits[np.random.default_rng(seed).permutation(len(bits))]
    first, last = bits[:, 0], bits[:, -1]
    picks = [int(i) for i in range(len(bits))]
    for mask in (first & last, last & ~first, first & ~last):
        picks = [*(int(i) for i in np.flatnonzero(mask)[:1]), *picks]
    unique = list(dict.fromkeys(picks))[:wanted]
    return [blocks_of(bits[p]) for p in unique]


def _same_on_meta(family: str, stack: BlockStack, changes: dict[str, Any]) -> None:
    """Discovery needs no weights."""
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        empty = factory.from_config(tiny_config(family, **changes), dtype=torch.float32)
    assert find_stack(empty) == stack, "the meta device shows other blocks than the real model"


def _replay_is_forward(
    model: Any, stack: BlockStack, tokens: torch.Tensor, states: Sequence[Sequence[int]]
) -> float:
    """Largest relative difference of replayed from real passes: each state, then the original
    again, so that nothing a state leaves behind in the recorded calls goes unseen."""
    model.requires_grad_(False)
    recording = Replay(model, stack_modules(model, stack)).record(tokens)
    worst = 0.0
    for removed in [*states, []]:
        with torch.no_grad():
            with skipped(model, stack, removed):
                expected = model(tokens, use_cache=False).logits
            stream = recording.entered
            for i in range(len(stack)):
                stream = stream if i in removed else recording.block(i, stream)
            rows = [recording.logits(stream[s], s) for s in range(len(tokens))]
        worst = max(worst, relative_difference(expected, torch.stack(rows)))
    assert worst <= _TOLERANCE, f"replay differs from a forward pass by {worst:.1e}"
    return worst


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _rows_in_words(rows: Sequence[Any]) -> str:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row.name)
    return "; ".join(
        reason if len(names) == 1 else f"{reason} ({len(names)} rows)"
        for reason, names in groups.items()
    )


def table(reports: Sequence[FamilyReport]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| family | outcome | blocks | states cut | largest difference | sublayer gate | remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        gate = ("yes" if r.sublayer else "no: block gate only") if r.outcome == "passed" else ""
        size = f"{r.difference:.1e}" if r.states else ""
        remark = (r.reason or r.rows).replace("|", "/").replace("\n", " ")
        lines.append(
            f"| {r.family} | {r.outcome} | {r.kinds} | {r.states or ''} | {size} | {gate} "
            f"| {remark} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Check the named families (all, when none is named); 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m isingcut.testing architectures")
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="default: all")
    parser.add_argument("--states", type=int, default=6, help="states cut per family")
    parser.add_argument("--docs", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args(list(arguments))
    reports = []
    for family in options.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            reports.append(check_family(family, Path(folder), states=options.states))
        latest = reports[-1]
        print(f"{family}: {latest.outcome} {latest.reason or latest.kinds}", flush=True)
    print(table(reports))
    if options.docs:
        _replace_table(options.docs, table(reports))
    for outcome in ("passed", "refused", "failed"):
        print(f"architectures_{outcome}: {sum(r.outcome == outcome for r in reports)}")
    return int(any(r.outcome == "failed" for r in reports))


def _replace_table(path: Path, text: str) -> None:
    start, end = "<!-- table -->", "<!-- end of table -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
