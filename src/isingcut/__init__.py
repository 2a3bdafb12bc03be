"""Remove the right blocks from a large language model.

    import isingcut

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Names are loaded on first use, so that the numerical core comes without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from isingcut.provenance import __version__ as __version__

if TYPE_CHECKING:
    from isingcut.api import Options, PoorEnergyWarning, open_run, prune
    from isingcut.api_run import Run, State
    from isingcut.config import RunConfig
    from isingcut.hamiltonian import Hamiltonian
    from isingcut.pipeline import energy, run
    from isingcut.problem import Problem
    from isingcut.solvers import solve
    from isingcut.spectrum import Spectrum

__all__ = [
    "Hamiltonian",
    "Options",
    "PoorEnergyWarning",
    "Problem",
    "Run",
    "RunConfig",
    "Spectrum",
    "State",
    "energy",
    "open_run",
    "prune",
    "run",
    "solve",
]

_HOMES = {
    "Hamiltonian": "hamiltonian",
    "Options": "api",
    "PoorEnergyWarning": "api",
    "Problem": "problem",
    "Run": "api_run",
    "RunConfig": "config",
    "Spectrum": "spectrum",
    "State": "api_run",
    "energy": "pipeline",
    "open_run": "api",
    "prune": "api",
    "run": "pipeline",
    "solve": "solvers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"isingcut.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
