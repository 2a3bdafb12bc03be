"""Whether a checkpoint is patched before it is distilled, and what is said where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.errors import ArchitectureError, FitError, VerificationError
from isingcut.healing.healers import RECORD, registry
from isingcut.healing.job import Job
from isingcut.healing.patch.files import runs
from isingcut.report.card import kept_parts

CANNOT = (ArchitectureError, FitError)
"""Why a patch is left out where nobody asked for it: the model, or too little text or memory."""


def start_of(student: Path) -> str:
    """What a checkpoint is by its records: ``cut`` exactly, ``patched``, or ``healed``."""
    if (student / RECORD).exists():
        return "healed"
    parts = kept_parts(student)
    patched = parts is not None and parts.patch is not None and parts.patch.cuts
    return "patched" if patched else "cut"


def patch(job: Job, out: Path) -> dict[str, Any]:
    """Patch into ``out``; where that cannot be, and nobody asked for it, say why.

    Returns:
        what the healer says, or `unpatched`.

    Raises:
        ArchitectureError, FitError: `--patch linear` was given, and no cut can be patched.
        VerificationError: the same, and the checkpoint is not exactly the cut.
    """
    shutil.rmtree(out, ignore_errors=True)
    try:
        return registry.get("linear-patch")().heal(job, out)  # type: ignore[no-any-return]
    except (*CANNOT, VerificationError) as e:
        shutil.rmtree(out, ignore_errors=True)
        if job.config.patch is not None:
            raise
        return unpatched(job.removed, e)


def unpatched(removed: Sequence[int], why: Exception) -> dict[str, Any]:
    """The record of a patch that no cut of a state could take."""
    reasons = [{"removed": list(ends), "reason": str(why)} for ends in runs(removed)]
    return {"cuts": [], "changed": False, "unpatched": reasons}
