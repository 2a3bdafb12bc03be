"""The interface of energies: ways to measure a Hamiltonian from a model and text."""

from __future__ import annotations

from typing import ClassVar, Protocol

from isingcut.data.calibration import TokenSet
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


class Energy(Protocol):
    """An estimator of the energy of block removals.

    A part is a frozen dataclass whose fields are its options. It must be deterministic, and return
    a symmetric J with zero diagonal and the right unit. Set the class attribute ``streams`` to
    False if all blocks must be in memory.
    """

    default_samples: ClassVar[int]

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Measure the Hamiltonian of the replayed model on ``tokens``."""
        ...
