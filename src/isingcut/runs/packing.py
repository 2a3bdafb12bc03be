"""Stage `pack`: choose a GGUF type and the blocks to remove with it, by measurement.

For each type, either the whole model meets the budget, or blocks are removed that one pass of the
original finds. Those that may be the best are measured as the final file: patched, packed and read
back. The KL of type and cut alone are about additive, so their sum decides what is measured first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from isingcut.data.calibration import Calibration
from isingcut.energies.search import Target
from isingcut.energies.search.evaluator import Evaluator
from isingcut.energies.search.proposals import one_pass_states
from isingcut.errors import ArchitectureError, InfeasibleError
from isingcut.files.results import read_document, without_infinities, write_document
from isingcut.files.runs import BlockList, PackedLosses, PackingFile
from isingcut.formats.cutting.gguf import refuse_uncuttable
from isingcut.formats.gguf_files import PACKED
from isingcut.formats.sources import find_gguf
from isingcut.ising.states import Floats, blocks_of
from isingcut.measure.losses import standard_error
from isingcut.measure.packed import changed_losses
from isingcut.models.packing import Packer
from isingcut.options.search import SearchOptions
from isingcut.runs import constraints, cutting
from isingcut.runs.context import Context
from isingcut.runs.stages import Inputs, Planned, Runner, stage

FINALISTS = 3
LEFT = 0.25
"""Maximum number of states to patch and pack; and the assumed lowest share of a cut's KL that
remains after a patch (half remains after the best patches measured)."""


def find_types(
    context: Context, config: SearchOptions, blocks: BlockList
) -> tuple[Packer, list[PackedLosses]]:
    """Return the types in which the model or a part of it meets the budget, the finest first.

    Raises:
        InfeasibleError: no type meets it; the message has the nearest budget that can be met.
        ArchitectureError: the GGUF file has types that cannot be packed, or has to be cut, which
            llama.cpp would not run.
    """
    packer = Packer(context.loaded, find_gguf(context.options.model))
    types = list[PackedLosses]()
    why = None
    for name in ("", *PACKED):
        packed = packer.costs(name, blocks.blocks)
        own = blocks.model_copy(update={"packed": packed})
        if any(
            f.packed.bytes == packed.bytes and f.packed.other == packed.other
            for f in types
        ):
            continue  # the same model again: no tensor of the file has more bits than this type
        rows = [constraints.budget_row(own, budget) for budget in config.budget.parts]
        fits = all(row.rhs <= 0 for row in rows)
        try:
            if not fits:
                constraints.removal_rows(own, config)
            if not fits and packer.header is not None:
                depth = context.stack.depth
                refuse_uncuttable(packer.header, depth, depth)
            types.append(PackedLosses(packed=packed, fits=fits))
        except (ArchitectureError, InfeasibleError) as e:
            why = e
    if not types:
        assert why is not None
        raise why
    return packer, types


def choose_type(runner: Runner, config: SearchOptions) -> PackingFile:
    """Choose a type that meets the budget; store its costs in `run.json` for the later stages."""
    packing = pack(runner, config)
    runner.folder.run.blocks.packed = packing.best.packed
    runner.folder.save()
    return packing


def _check_types(context: Context, config: SearchOptions, blocks: BlockList) -> None:
    """Raise if no type meets the budget for a packed model."""
    if config.budget.packed:
        find_types(context, config, blocks)


def _plan(runner: Runner, config: Any) -> Planned:
    file = runner.folder.target(config.removal) / "packing.json"
    return Planned(file, cutting.plan_patch(config))


@stage(
    "pack", partial(read_document, model=PackingFile), plan=_plan, check=_check_types
)
def pack(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    packer, types = find_types(context, options, inputs.blocks)
    _measure(context, inputs, options, packer, types)
    best = int(np.argmin([row.loss for row in types]))
    write_document(
        out, PackingFile(budget=str(options.budget), types=types, chosen=best)
    )


def _measure(
    context: Context,
    inputs: Inputs,
    options: Any,
    packer: Packer,
    types: Sequence[PackedLosses],
) -> None:
    """Measure the types and cuts that may be the best, and store their KL in ``types``."""
    calibration = inputs.read("calibration", Calibration.load)
    tokens = calibration.splits["rank"]
    fit = cutting.Fit.of(context, calibration, options)
    work = context.work()
    kept = context.work(inputs.place / "packing.journal")
    evaluator = Evaluator(context.replay, tokens, kept, options.seed)
    counts = tokens.predicted.sum(1).numpy().astype(np.int64)

    def losses(
        choice: PackedLosses, removed: Sequence[int]
    ) -> tuple[float, float | None]:
        """Return KL and standard error of the model in a type, without some blocks and patched."""
        kind = choice.packed.type
        named = f"{kind or 'its own type'}, {len(removed)} blocks out"

        def make() -> Floats:
            new = cutting.fit_patch(fit, removed, context.progress)

            def change(name: str, own: Tensor) -> Tensor | None:
                return packer.pack(kind, name, own, new.get(name))

            return changed_losses(context.replay, tokens, change, work, named, removed)

        key = f"{kind}:{removed}:{fit.repair}:{fit.tokens}" if removed else kind
        sums = evaluator.ledger.measure_once(key, 0.0, 0.0, make)
        error = without_infinities(float(standard_error(sums, counts)))
        # Rounding may give a negative KL.
        return max(0.0, float(sums.sum() / counts.sum())), error

    limit = float("inf")
    for choice in sorted(types, key=lambda f: not f.fits):
        if limit > 0:
            # Without a type, the weights are those of the original.
            choice.kl, choice.kl_se = (
                losses(choice, []) if choice.packed.type else (0.0, 0.0)
            )
            limit = min(limit, choice.loss)
    # A cut only adds to the KL of its type.
    rest = [f for f in types if not f.fits and f.kl is not None and f.kl < limit]
    for choice in rest:
        _find_cut(options, inputs.blocks, evaluator, choice)
    for choice in sorted(rest, key=lambda f: f.predicted or 0.0)[:FINALISTS]:
        if (choice.kl or 0.0) + LEFT * (choice.cut_kl or 0.0) < limit:
            choice.measured, choice.measured_se = losses(choice, choice.removed)
            limit = min(limit, choice.loss)


def _find_cut(
    config: SearchOptions,
    blocks: BlockList,
    evaluator: Evaluator,
    choice: PackedLosses,
) -> None:
    """Find the best one-pass state that meets the budget in a type; store it and its KL."""
    own = blocks.model_copy(update={"packed": choice.packed})
    target = Target(config.removal, constraints.removal_rows(own, config))
    states = np.array([*one_pass_states(evaluator, target, evaluator.m).values()])
    kl = evaluator.ledger.losses(states)
    choice.removed = blocks_of(states[kl.argmin()])
    choice.cut_kl = float(kl.min())
