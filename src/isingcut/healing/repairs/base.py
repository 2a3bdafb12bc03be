"""Make a repair: choose it by the options, write its patches to a checkpoint, and verify that."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isingcut.errors import ArchitectureError, FitError
from isingcut.files.cuts import PatchRecord, UnpatchedCut
from isingcut.files.writing import atomic_folder
from isingcut.formats.cutting.checkpoint import write_weights
from isingcut.formats.safetensors_files import (
    NewTensor,
)
from isingcut.healing.job import Job
from isingcut.healing.patch.files import (
    Patch,
    StoredLayers,
    apply_patches,
    runs,
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
        layers: the checkpoint that stores the layers, for patches in its form; None: any layer may
            be patched.
        kept: what earlier states of this text computed, to read and to add to.

    Raises:
        ArchitectureError, FitError: no cut can be patched, with the reasons.
    """
    tokens = job.tokens.first(job.config.patch_tokens, 2)
    made: Repaired = registry.get(job.config.repair)().patch(job, tokens, layers, kept)
    if layers is not None:
        layers.store(made.patches)
        made.record.changed = any(patch.record.changed for patch in made.patches)
    return made


def patch_checkpoint(job: Job, out: Path) -> PatchRecord:
    """Make the repair of the job's options, write a patched copy of its start and verify it.

    Raises:
        ArchitectureError, FitError: as `make_patches`; nothing was written.
    """
    teacher = job.teacher
    layers = StoredLayers(job.start, teacher.stack, job.removed.layers)
    record = make_patches(job, layers).record
    tensors = [NewTensor(name, stored) for name, stored in layers.tensors.items()]
    skip = shutil.ignore_patterns("*.safetensors*")
    with atomic_folder(out) as temporary:
        shutil.copytree(job.start, temporary, dirs_exist_ok=True, ignore=skip)
        write_weights(temporary, tensors, layers.replaced)
    with apply_patches(teacher.replay, layers.patches):
        record.proof = verify(
            teacher.runnable,
            job.removed,
            out,
            trust_remote_code=teacher.trusted,
            progress=job.progress,
        )
    return record


def record_unpatched(removed: Sequence[int], why: Exception) -> PatchRecord:
    """Make the record of a state whose cuts cannot be patched."""
    reasons = [
        UnpatchedCut(removed=list(ends), reason=str(why)) for ends in runs(removed)
    ]
    return PatchRecord(cuts=[], changed=False, unpatched=reasons)


def before_training(name: str) -> str:
    """Return the repair to make before a training of all layers: `linear` for one that trains."""
    return "linear" if registry.get(name).trains else name
