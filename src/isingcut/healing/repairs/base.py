"""Make a repair: choose it by the options, write its patches to a checkpoint, and verify that."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isingcut.errors import ArchitectureError, FitError
from isingcut.files.cuts import PatchRecord, UnpatchedCut
from isingcut.formats.architectures.blocks import find_stack
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    runs,
    write_patched,
)
from isingcut.healing.repairs import registry
from isingcut.measure.streams import Kept, SampleStreams
from isingcut.models.verify import verify

CANNOT = (ArchitectureError, FitError)
"""Errors after which the patch is left out, unless an option requires it."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """The patches of one state.

    Attributes:
        patches: those of all changed layers.
        record: the record of the maps and their tuning, without a proof.
        original: the original's hidden states of a fit, for a tuning on the same samples.
    """

    patches: list[Patch]
    record: PatchRecord
    original: SampleStreams | None = None


def make_patches(
    job: Job, layers: StoredLayers | None = None, kept: Kept | None = None
) -> Repaired:
    """Make the repair of the job's options from its first `patch_tokens` tokens.

    Args:
        layers: the checkpoint to write the layers to; None: any layer may be patched.
        kept: what earlier states of this text computed, to read and to add to.

    Raises:
        ArchitectureError, FitError: no cut can be patched, with the reasons.
    """
    tokens = job.tokens.first(job.config.patch_tokens, 2)
    repaired: Repaired = registry.get(job.config.repair)().patch(
        job, tokens, layers, kept
    )
    return repaired


def patch_checkpoint(job: Job, out: Path) -> PatchRecord:
    """Make the repair of the job's options, write ``out`` and verify it.

    Raises:
        ArchitectureError, FitError: as `make_patches`; nothing was written.
    """
    layers = StoredLayers(job.start, find_stack(job.teacher.model), job.removed)
    made = make_patches(job, layers)
    stored = write_patched(layers, made.patches, out)
    trust = job.config.trust_remote_code
    replay = job.teacher.replay
    with apply_patches(replay.blocks, stored, resident=not replay.streamed):
        made.record.proof = verify(
            job.teacher.runnable,
            job.removed,
            out,
            trust_remote_code=trust,
            progress=job.progress,
        )
    made.record.changed = any(p.record.changed for p in stored)
    return made.record


def record_unpatched(removed: Sequence[int], why: Exception) -> PatchRecord:
    """Make the record of a state whose cuts cannot be patched."""
    reasons = [
        UnpatchedCut(removed=list(ends), reason=str(why)) for ends in runs(removed)
    ]
    return PatchRecord(cuts=[], changed=False, unpatched=reasons)


def before_training(name: str) -> str:
    """Return the repair to make before a training of all layers: `linear` for one that trains."""
    return "linear" if registry.get(name).trains else name
