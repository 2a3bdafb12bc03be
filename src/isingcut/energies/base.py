"""What an energy is: a way to measure a Hamiltonian from a model and text."""

from __future__ import annotations

from typing import ClassVar, Protocol

from isingcut.data.calibration import TokenSet
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


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
