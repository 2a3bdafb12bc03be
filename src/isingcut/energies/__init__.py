"""Energies: measure a `Hamiltonian` from a model and text. One file per estimator.

An energy is a frozen dataclass whose fields are its options. `measure(replay, tokens, work)`
returns the Hamiltonian; ``default_samples`` is a class attribute. The result must be deterministic,
with a symmetric J that has a zero diagonal, and the right unit. Set the class attribute ``streams``
to False if all blocks must be in memory. Estimates of time need `price(n, sizes)`, the `base.Price`
of an energy of ``n`` blocks to remove ``sizes`` of.
"""

from isingcut.registry import Registry

registry = Registry(__name__, "energy", choices=("auto",))
"""All energies by name; `registry.names()` lists them without an import."""
