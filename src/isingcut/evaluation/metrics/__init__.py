"""Metrics: further figures of an evaluation, besides perplexity, NLL and KL.

A metric is a frozen dataclass. Its method `measure(sums, counts)` returns a model's figure and the
standard error, or None. ``sums`` (3, m) are the NLL of the original, the NLL of the model and
KL(original || model), each summed over the ``counts`` (m,) tokens of a sample, in nats. Its class
attributes are ``unit`` and ``form``, the format specification of the figure in tables. Every
registered metric is measured.
"""

from isingcut.registry import Registry

registry = Registry(__name__, "metric")
"""All metrics by name."""
