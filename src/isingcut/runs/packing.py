"""Stage `pack`: choose a GGUF type and the blocks to remove with it, by measurement.

For each type, either the whole model meets the budget, or blocks are removed that one pass of the
original finds. Those that may be the best are measured as the final file: patched, packed and read
back. The KL of type and cut alone are about additive, so their sum decides what is measured first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

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
from isingcut.runs import cutting, measuring, solving
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session
from isingcut.runs.stages import Making, stage, typed_options

FINALISTS = 3
LEFT = 0.25
"""Maximum number of states to patch and pack; and the assumed lowest share of a cut's KL that
remains after a patch (half remains after the best patches measured)."""


def find_types(
    session: Session, blocks: BlockList
) -> tuple[Packer, list[PackedLosses]]:
    """Return the types in which the model or a part of it meets the budget, the finest first.

    Raises:
        InfeasibleError: no type meets it; the message has the nearest budget that can be met.
        ArchitectureError: the GGUF file has types that cannot be packed, or has to be cut, which
            llama.cpp would not run.
    """
    packer = Packer(session.loaded, find_gguf(session.config.model))
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
        rows = [
            solving.budget_row(own, budget) for budget in session.config.budget.parts
        ]
        fits = all(row.rhs <= 0 for row in rows)
        try:
            if not fits:
                solving.removal_rows(own, session.config)
            if not fits and packer.header is not None:
                layers = len(set(session.stack.layers))
                refuse_uncuttable(packer.header, layers, layers)
            types.append(PackedLosses(packed=packed, fits=fits))
        except (ArchitectureError, InfeasibleError) as e:
            why = e
    if not types:
        assert why is not None
        raise why
    return packer, types


def choose_type(session: Session, folder: RunFolder) -> PackingFile:
    """Choose a type that meets the budget; store its costs in `run.json` for the later stages."""
    packing = pack(session, folder)
    folder.run.blocks.packed = packing.best.packed
    folder.save()
    return packing


def _check_types(session: Session, blocks: BlockList) -> None:
    """Raise if no type meets the budget for a packed model."""
    if session.config.budget.packed:
        find_types(session, blocks)


@stage("pack", partial(read_document, model=PackingFile), check=_check_types)
def pack(session: Session, folder: RunFolder) -> Making:
    config = session.config
    file = folder.target(session.config) / "packing.json"
    journal = file.with_name("packing.journal")
    options = measuring.calibration_options(folder) | typed_options("pack", config)
    options |= cutting.share_options(config) | session.numerics

    path = yield folder, file, options
    session.choose_tuning(folder)
    packer, types = find_types(session, folder.run.blocks)
    _measure(session, folder, packer, types, journal)
    best = int(np.argmin([row.loss for row in types]))
    write_document(
        path, PackingFile(budget=str(config.budget), types=types, chosen=best)
    )


def _measure(
    session: Session,
    folder: RunFolder,
    packer: Packer,
    types: Sequence[PackedLosses],
    journal: Path,
) -> None:
    """Measure the types and cuts that may be the best, and store their KL in ``types``."""
    config = session.config
    tokens = measuring.read_calibration(folder).splits["rank"]
    work = session.work()
    evaluator = Evaluator(session.replay, tokens, session.work(journal), config.seed)
    counts = tokens.predicted.sum(1).numpy().astype(np.int64)

    def losses(
        choice: PackedLosses, removed: Sequence[int]
    ) -> tuple[float, float | None]:
        """Return KL and standard error of the model in a type, without some blocks and patched."""
        kind = choice.packed.type
        named = f"{kind or 'its own type'}, {len(removed)} blocks out"

        def make() -> Floats:
            new = cutting.fit_patch(session, folder, removed, session.progress)

            def change(name: str, own: Tensor) -> Tensor | None:
                return packer.pack(kind, name, own, new.get(name))

            return changed_losses(session.replay, tokens, change, work, named, removed)

        key = (
            f"{kind}:{removed}:{config.patch}:{config.patch_tokens}"
            if removed
            else kind
        )
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
        _find_cut(session, folder.run.blocks, evaluator, choice)
    for choice in sorted(rest, key=lambda f: f.predicted or 0.0)[:FINALISTS]:
        if (choice.kl or 0.0) + LEFT * (choice.cut_kl or 0.0) < limit:
            choice.measured, choice.measured_se = losses(choice, choice.removed)
            limit = min(limit, choice.loss)


def _find_cut(
    session: Session, blocks: BlockList, evaluator: Evaluator, choice: PackedLosses
) -> None:
    """Find the best one-pass state that meets the budget in a type; store it and its KL."""
    config = session.config
    own = blocks.model_copy(update={"packed": choice.packed})
    target = Target(config.removal, solving.removal_rows(own, config))
    states = np.array([*one_pass_states(evaluator, target, evaluator.m).values()])
    kl = evaluator.ledger.losses(states)
    choice.removed = blocks_of(states[kl.argmin()])
    choice.cut_kl = float(kl.min())
