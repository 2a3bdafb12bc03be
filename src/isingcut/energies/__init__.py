"""Energies: measure a `Hamiltonian` from a model and text. One file per estimator."""

from isingcut.registry import Registry

registry = Registry("energies", "energy", choices=("auto",))
"""All energies by name; `registry.names()` lists them without an import."""
