"""Conformance kits for parts, checks of a GPU, fake cards, and tiny models."""
