"""How a measurement is carried out, whatever it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isingcut.progress import Progress, silent


@dataclass(frozen=True)
class Work:
    """How a measurement is carried out; none of it changes the result beyond rounding.

    Attributes:
        batch_tokens: tokens computed at a time.
        progress: where progress is shown.
        journal: file that keeps finished parts, so that a killed measurement resumes.
    """

    batch_tokens: int = 1024
    progress: Progress = silent
    journal: Path | None = None
