"""Conformance kits for parts (solvers, architectures), and tiny models."""
