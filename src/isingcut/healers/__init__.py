"""Healers: what wins back quality after a cut."""

from isingcut.registry import Registry

registry = Registry("healers", "healer")
"""All healers; ``registry.names()`` lists them."""
