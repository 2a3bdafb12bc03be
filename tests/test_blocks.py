"""Replay: recorded calls give what a forward pass gives, for tuple and tensor outputs."""

import numpy as np
import pytest
import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import find_stack, skipped
from isingcut.models.replay import Replay
from tiny import tiny_replay

FAMILIES = ["llama", "gemma3", "gpt2"]


def token_ids(replay, batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, 200, (batch, length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_blocks_out_is_skipping_them(family):
    replay = tiny_replay(family)
    ids = token_ids(replay)
    removed = [0, len(replay) - 1]
    with torch.no_grad():
        with skipped(replay.model, find_stack(replay.model), removed):
            expected = replay.model(input_ids=ids, use_cache=False).logits
        recording = replay.record(ids)
        stream = recording.entered
        for i in np.setdiff1d(np.arange(len(replay)), removed):
            stream = recording.block(int(i), stream)
        got = torch.stack([recording.logits(stream[s], s) for s in range(len(ids))])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_forward_set_by_others_comes_back():
    replay = tiny_replay("llama")
    block = replay.blocks[1]
    original = block.forward
    calls = []

    def hooked(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = hooked
    ids = token_ids(replay)
    with torch.no_grad():
        replay.record(ids)
        assert not calls
        replay.model(input_ids=ids, use_cache=False)
    assert calls == [1]


def test_a_block_that_returns_no_stream_is_refused():
    class Odd(nn.Module):
        def forward(self, hidden_states):
            return {"hidden": hidden_states}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Odd()])
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            return self.layers[0](torch.zeros(1, 4, 2))

    model = Model()
    with pytest.raises(ArchitectureError, match="Odd"):
        Replay(model, list(model.layers))
