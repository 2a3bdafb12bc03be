"""The same tiny model streamed and in memory, for the tests of streaming."""

import numpy as np
import torch

from isingcut.data.tokens import TokenSet
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import StreamedReplay, open_model
from tiny import random_tokens, replay_of

CPU = torch.device("cpu")


def samples() -> TokenSet:
    return random_tokens((12, 9, 12))


def some_states(n: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).random((count, n)) < 0.4


def in_memory(folder) -> Replay:
    return replay_of(load(folder, dtype="float32", device="cpu").model)


def streamed(folder) -> StreamedReplay:
    return StreamedReplay(*open_model(folder, dtype=torch.float32, device=CPU))


def watch(replay: StreamedReplay) -> list[set[str]]:
    """Which parts have weights at each call of a block; also that these lie in two buffers."""
    seen: list[set[str]] = []
    outer = {"embed": replay._embedding, "head": replay.model.get_output_embeddings()}
    modules = {**{str(i): block for i, block in enumerate(replay.blocks)}, **outer}

    def look(module, args):
        real = {
            name: p.untyped_storage().data_ptr()
            for name, m in modules.items()
            for p in m.parameters()
            if not p.is_meta
        }
        seen.append(set(real))
        assert len(set(real.values())) <= 2

    for block in replay.blocks:
        block.register_forward_pre_hook(look)
    return seen
