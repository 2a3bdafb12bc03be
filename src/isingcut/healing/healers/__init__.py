"""Healers: what wins back quality after a cut."""

from isingcut.registry import Registry

registry = Registry("healers", "healer", "healing")
"""All healers; ``registry.names()`` lists them."""

RECORD = "healing.json"
"""The file of a healed checkpoint that says what was done to it."""
