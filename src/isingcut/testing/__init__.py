"""Conformance kits for parts, checks of a GPU, and tiny models."""
