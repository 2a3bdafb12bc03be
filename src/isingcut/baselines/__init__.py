"""Baselines: published ways to choose blocks, for comparison. One file per method."""

from isingcut.registry import Registry

registry = Registry(
    "baselines",
    "baseline",
    gone={
        "sliding-window-merging": "isingcut does not merge blocks; docs/experiments.md in the "
        "repository has results of this method"
    },
)
"""All baselines by name; `registry.names()` lists them without an import."""
