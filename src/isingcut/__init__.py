"""Isingcut: remove the right blocks from a large language model."""

__version__ = "0.1.0"
