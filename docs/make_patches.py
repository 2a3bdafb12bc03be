"""Find the layers that absorb a linear patch, for each family's kinds of block, on tiny models.

    python docs/make_patches.py                  the families of `isingcut.testing.tiny`
    python docs/make_patches.py llama gemma2     some of them

A block of each kind is patched after the removal of the next block, and must find its layer in the
saved checkpoint. Random weights leave little to gain: the shares only show that the block's output
on held-out tokens is nearer to the target.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError
from isingcut.formats.architectures.blocks import find_stack
from isingcut.healing.patch.files import StoredLayers
from isingcut.healing.repairs.linear import fit_patches
from isingcut.measure.work import Work
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.testing.tiny import FAMILIES, VOCABULARY, tiny_checkpoint

_SAMPLES, _LENGTH = 96, 32


@dataclass(frozen=True)
class Absorbs:
    """Layer that absorbs a patch in one kind of block.

    Attributes:
        kind: kind of the block.
        layer: name of the patched layer in the block; empty if there is none.
        exact: whether the block's output is linear in the layer.
        left: remaining share of the error on held-out tokens.
        reason: reason why no layer is patched.
    """

    kind: str
    layer: str = ""
    exact: bool = False
    left: float = 1.0
    reason: str = ""


def absorbers(family: str, folder: Path) -> list[Absorbs]:
    """Find the layer that absorbs a patch, for each kind of block that another block follows.

    Args:
        folder: new folder for the checkpoint.

    Raises:
        ArchitectureError: the family's blocks cannot be run one at a time.
    """
    source = tiny_checkpoint(family, folder)
    model = load(source, dtype="float32", device="cpu").model
    stack = find_stack(model)
    replay = Replay(model)
    stored = StoredLayers(source, stack, [])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8, VOCABULARY, (_SAMPLES, _LENGTH), generator=generator)
    text = TokenSet.from_rows(rows.tolist())
    found = []
    for kind in dict.fromkeys(stack.kinds[:-1]):
        # The last of its kind, because the first blocks of many families are special.
        p = max(i for i, k in enumerate(stack.kinds[:-1]) if k == kind)
        try:
            fitted = fit_patches(replay, text, [p + 1], Work(1024), stored)
        except ArchitectureError as refusal:
            found.append(Absorbs(kind, reason=str(refusal)))
            continue
        record = fitted.patches[0].record
        assert record.held_out_error_left is not None
        found.append(
            Absorbs(kind, record.layer, record.exact, record.held_out_error_left)
        )
    return found


def table(found: dict[str, list[Absorbs] | str]) -> str:
    """Return the results as a Markdown table, one row per family."""
    lines = [
        "| family | exact | by gains | none | held-out error left |",
        "|---|---|---|---|---|",
    ]
    for family, kinds in found.items():
        if isinstance(kinds, str):
            lines.append(f"| {family} |  |  | {kinds} |  |")
            continue
        none = "; ".join(f"{row.kind}: {row.reason}" for row in kinds if not row.layer)
        left = [row.left for row in kinds if row.layer]
        ends = sorted({f"{min(left):.2f}", f"{max(left):.2f}"}) if left else []
        cells = [
            _layers(kinds, exact=True),
            _layers(kinds, exact=False),
            none,
            " to ".join(ends),
        ]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _layers(kinds: Sequence[Absorbs], *, exact: bool) -> str:
    rows = [row for row in kinds if row.layer and row.exact == exact]
    by_layer = {
        row.layer: [r.kind for r in rows if r.layer == row.layer] for row in rows
    }
    return "; ".join(
        f"`{layer}` ({', '.join(kinds)})" for layer, kinds in by_layer.items()
    )


def main() -> int:
    """Print the table; return 2 for an unknown family."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="families (default: all)")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        print(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
        return 2
    found: dict[str, list[Absorbs] | str] = {}
    with tempfile.TemporaryDirectory() as room:
        for family in options.families or FAMILIES:
            try:
                found[family] = absorbers(family, Path(room) / family)
            except ArchitectureError as refusal:
                found[family] = str(refusal)
    print(table(found))
    kinds = [
        row for rows in found.values() if not isinstance(rows, str) for row in rows
    ]
    print(f"patches_absorbed: {sum(bool(row.layer) for row in kinds)}")
    print(f"patches_none: {sum(not row.layer for row in kinds)}")
    print(
        f"patches_not_measured: {sum(isinstance(rows, str) for rows in found.values())}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
