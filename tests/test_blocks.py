"""Replay: recorded calls give what a forward pass gives, for tuple and tensor outputs."""

import pytest
import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.models.replay import Replay
from tiny import tiny_replay


def token_ids(replay, batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, 200, (batch, length), generator=generator)


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
