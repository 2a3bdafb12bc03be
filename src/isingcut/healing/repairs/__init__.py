"""Repairs: ways to change layers of a cut model, so that it computes more like the original.

A repair is a frozen dataclass. Its method `patch(job, tokens, layers, kept)` returns a
`base.Repaired`: new weights for layers of the kept blocks, and the record of how they were found.
Its class attributes are ``passes``, its cost in forward passes over the tokens, and ``trains``,
whether it trains layers, which needs the model in memory and is left to `--heal` where that trains
the model next.
"""

from isingcut.registry import Registry

registry = Registry(__name__, "repair")
"""All repairs by name; `registry.names()` lists them without an import."""
