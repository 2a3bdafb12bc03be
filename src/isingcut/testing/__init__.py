"""Conformance kits for parts (solvers, architectures), tiny models, and a fake device."""
