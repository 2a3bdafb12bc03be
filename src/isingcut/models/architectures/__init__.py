"""Find the blocks of a decoder, and cut them out of its configuration.

`discover` the stack and run it without some blocks, `kinds` what a block is and costs,
`auto` which class builds it. How a configuration is cut: `fields` what they mean, as data,
`field_cuts` that table applied, `families` what is no table, `surgery` the smaller configuration;
`text_part` where the decoder's fields stand, `same_blocks` whether a cut builds the same blocks.

Names are loaded on first use, so that the data classes come without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isingcut.models.architectures.base import Block, BlockStack
    from isingcut.models.architectures.discover import (
        find_stack,
        skipped,
        stack_modules,
        text_config,
    )
    from isingcut.models.architectures.surgery import cut_config, legality

__all__ = [
    "Block",
    "BlockStack",
    "cut_config",
    "find_stack",
    "legality",
    "skipped",
    "stack_modules",
    "text_config",
]

_HOMES = {
    "Block": "base",
    "BlockStack": "base",
    "cut_config": "surgery",
    "find_stack": "discover",
    "legality": "surgery",
    "skipped": "discover",
    "stack_modules": "discover",
    "text_config": "discover",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
