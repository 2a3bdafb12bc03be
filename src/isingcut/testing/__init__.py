"""Conformance kits for parts: solvers, architectures, energies."""
