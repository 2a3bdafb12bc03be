"""Baselines: published ways to choose blocks, for comparison. One file per method."""

from isingcut.registry import Registry

registry = Registry(
    "baselines",
    "baseline",
    gone={
        "sliding-window-merging": "it merges blocks, which isingcut does not: its results are in "
        "docs/experiments.md of isingcut's repository"
    },
)
"""All baselines by name; `registry.names()` lists them without importing any."""
