"""How a measurement is carried out, whatever it measures, and what its journal is known by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Progress, silent
from isingcut.files.writing import fingerprint
from isingcut.options.config import BATCH_TOKENS

if TYPE_CHECKING:
    from isingcut.data.tokens import TokenSet
    from isingcut.models.replay import Replay


@dataclass(frozen=True)
class Work:
    """How a measurement is carried out; none of it changes the result beyond rounding.

    Attributes:
        batch_tokens: tokens computed at a time.
        progress: where progress is shown.
        journal: file that keeps finished parts, so that a killed measurement resumes.
    """

    batch_tokens: int = BATCH_TOKENS
    progress: Progress = silent
    journal: Path | None = None


def identity(replay: Replay, tokens: TokenSet, **depends: Any) -> str:
    """The fingerprint of what is measured, for its journal.

    Args:
        depends: what the numbers depend on besides the model and its text, JSON-able.
    """
    told = {"tokens": tokens.input_ids.tolist(), "mask": tokens.mask.tolist()}
    if tokens.counted is not None:
        told["counted"] = tokens.counted.tolist()
    return fingerprint({**replay.identity(), **told, **depends})
