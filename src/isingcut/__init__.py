"""Remove the right blocks from a large language model.

    import isingcut

    folder = isingcut.run(model="smollm2", remove=6, out="my-run")

Names are loaded on first use, so that the numerical core comes without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isingcut.config import RunConfig
    from isingcut.hamiltonian import Hamiltonian
    from isingcut.pipeline import energy, run
    from isingcut.problem import Problem
    from isingcut.solvers import solve
    from isingcut.spectrum import Spectrum

__version__ = "0.1.0"

__all__ = ["Hamiltonian", "Problem", "RunConfig", "Spectrum", "energy", "run", "solve"]

_HOMES = {
    "Hamiltonian": "hamiltonian",
    "Problem": "problem",
    "RunConfig": "config",
    "Spectrum": "spectrum",
    "energy": "pipeline",
    "run": "pipeline",
    "solve": "solvers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"isingcut.{_HOMES[name]}"), name)
