"""Perplexity and KL of a checkpoint on the text that a healing holds out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.data.tokens import TokenSet
from isingcut.evaluation.quality import quality
from isingcut.files.documents.scores import PairScores
from isingcut.healing.job import Job
from isingcut.models.cutting.sharing import open_cut
from isingcut.models.streaming.replay import load_streamed


def scores(job: Job, folder: Path, report: TokenSet) -> dict[str, Any]:
    """Perplexity and KL to the original of a checkpoint on the held-out text."""
    size = job.config.batch_tokens
    trust = job.config.trust_remote_code
    if job.replay is None:
        cut, streamed = open_cut(job.teacher, job.removed, folder, trust_remote_code=trust)
        found = quality(
            job.teacher.model, streamed or cut.model, report, size, progress=job.progress
        )
    else:
        options: dict[str, Any] = {**job.teacher.place, "trust_remote_code": trust}
        _, streamed = load_streamed(folder, buffers=job.replay.store.buffers, **options)
        found = quality(job.replay, streamed, report, size, progress=job.progress)
    parts = {name: _healed_scores(part) for name, part in found.parts.items()}
    return {**_healed_scores(found), **({"parts": parts} if parts else {})}


def _healed_scores(found: PairScores) -> dict[str, Any]:
    return {
        **dict(found.after),
        "kl": found.kl,
        "kl_se": found.kl_se,
        "original_perplexity": found.before.perplexity,
    }
