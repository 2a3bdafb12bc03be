"""Run a model with some blocks passing the residual stream through: the reference for a cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.models.architectures.base import BlockStack
from isingcut.models.architectures.discover import stack_modules


@contextmanager
def skipped(model: nn.Module, stack: BlockStack, removed: Sequence[int]) -> Iterator[None]:
    """Within the block, every removed block hands on the hidden states it was given.

    The block still runs, and only its output is replaced: caches stay consistent and the
    output keeps its form (tensor or tuple). So this is exact but saves no time.

    Raises:
        ArchitectureError: a block number that does not exist.
    """
    outside = [i for i in removed if not 0 <= i < len(stack)]
    if outside:
        raise ArchitectureError(f"blocks are 0 to {len(stack) - 1}; got {outside}")
    modules = stack_modules(model, stack)
    handles = [
        modules[i].register_forward_hook(_pass_through, with_kwargs=True) for i in sorted(removed)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_through(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, torch.Tensor):
        return hidden
    return (hidden, *output[1:])
