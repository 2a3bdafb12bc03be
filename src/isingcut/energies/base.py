"""What an energy is: a way to measure a Hamiltonian from a model and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from isingcut.blocks import Replay
from isingcut.calibration import TokenSet
from isingcut.hamiltonian import Hamiltonian
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


class Energy(Protocol):
    """An estimator of the energy of block removals.

    A part is a frozen dataclass: its fields are its options. It must be deterministic, return
    a symmetric J with zero diagonal, and state its unit truthfully. Two more class attributes
    may be given: ``streams`` (False: the blocks must be in memory) and ``backward`` (True: most
    of the work is backward passes, for the choice of an attention).
    """

    default_samples: ClassVar[int]

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """The Hamiltonian of the replayed model on ``tokens``."""
        ...
