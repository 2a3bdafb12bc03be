"""Baselines: published ways to choose blocks, for comparison. One file per method."""

from isingcut.registry import Registry

registry = Registry(__name__, "baseline")
"""All baselines by name; `registry.names()` lists them without an import."""
