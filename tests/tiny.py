"""Tiny random models of every family, and tiny checkpoints with a tokenizer, all offline."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isingcut.data.tokens import TokenSet
from isingcut.models.architectures.blocks import find_stack, stack_modules
from isingcut.models.replay import Replay
from isingcut.testing.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

__all__ = ["tiny_checkpoint", "tiny_model", "tiny_tokenizer", "without"]


def replay_of(model: Any) -> Replay:
    """The replay of a model whose weights are frozen."""
    model.requires_grad_(False)
    return Replay(model, stack_modules(model, find_stack(model)))


def tiny_replay(
    family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Replay:
    """The replay of a tiny model of a family."""
    return replay_of(tiny_model(family, **changes).to(dtype))


def random_tokens(lengths: Sequence[int] = (14, 9, 14, 11)) -> TokenSet:
    """Samples of random tokens."""
    rng = np.random.default_rng(0)
    return TokenSet.from_rows([rng.integers(8, 200, k).tolist() for k in lengths])


def without(model: Any, removed: Sequence[int]) -> Any:
    """A copy of a model whose blocks are really gone; for forward passes without a cache."""
    cut = copy.deepcopy(model)
    stack = find_stack(cut)
    blocks = stack_modules(cut, stack)
    kept = [i for i in range(len(stack)) if i not in set(removed)]
    parent, _, name = stack.path.rpartition(".")
    setattr(cut.get_submodule(parent), name, nn.ModuleList(blocks[i] for i in kept))
    for key, value in list(vars(cut.config).items()):
        if isinstance(value, list) and len(value) == len(stack):
            setattr(cut.config, key, [value[i] for i in kept])
    cut.config.num_hidden_layers = len(kept)
    return cut
