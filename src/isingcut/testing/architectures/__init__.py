"""Conformance of architectures: every one cut, reloaded and compared, on tiny random models.

    python -m isingcut.testing architectures                   the families of `configurations`
    python -m isingcut.testing architectures llama gemma2      some of them
    python -m isingcut.testing architectures --all             every decoder that transformers has
    python -m isingcut.testing architectures --all qwen3_vl    the entries of some model types

For one architecture: its blocks are found (also on the meta device), replayed blocks give a
forward pass, gate gradients agree with autograd and with finite differences, and several random
legal states, with the first and the last block among them, are cut at the checkpoint, reloaded
with plain transformers and compared with the original with those blocks skipped. Each runs in a
process of its own with a limit of memory and time.

    conformance   what transformers has, the checks of one architecture, and its report
    shrink        a tiny configuration of any configuration class, by rule
    hands         the model types for which the rules are not enough
    command       the command line
"""

from isingcut.testing.architectures.command import main
from isingcut.testing.architectures.conformance import (
    Report,
    check_entry,
    check_family,
    legal_states,
)

__all__ = ["Report", "check_entry", "check_family", "legal_states", "main"]
