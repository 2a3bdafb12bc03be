"""Fitted patches, and what enters and leaves a layer, for the tests of patches."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch

from isingcut.data.tokens import TokenSet
from isingcut.healing.patch.linear import _Fitting, fit_patches
from isingcut.measure.work import Work
from isingcut.models.architectures.blocks import find_stack
from tiny import replay_of


def tokens(samples=12, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(8, 262, (samples, length), generator=generator).tolist()
    return TokenSet.from_rows([row[: length - 3 * (i % 3)] for i, row in enumerate(rows)])


def fitted(model, removed, text, *, reads=True):
    """Patches of what a layer reads, or of what it writes, as where memory is short."""
    stack, replay = find_stack(model), replay_of(model)

    def chosen(fitting, writes):
        for write in writes:
            write.reads = reads

    with mock.patch.object(_Fitting, "_choose_maps", chosen):
        return fit_patches(replay, stack.kinds, text, removed, Work(96)).patches


@contextmanager
def watched(model, block, path):
    """Streams and the layer's input in an ordinary forward pass."""
    found = {}
    module = model.model.layers[block]

    def inner(m, args, output):
        found["read"], found["written"] = args[0].double(), output.double()

    def outer(m, args, output):
        found["stream"] = (output[0] if isinstance(output, tuple) else output).double()

    handles = [
        module.get_submodule(path).register_forward_hook(inner),
        module.register_forward_hook(outer),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def streams(model, text, block):
    """What leaves a block of the intact model, (tokens, D), real tokens only."""
    with watched(model, block, "mlp.down_proj") as found, torch.no_grad():
        model(text.input_ids, use_cache=False)
    return found["stream"][text.mask]
