"""Choose the micro-batch for a device, and count the memory that a backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from isingcut.formats.architectures.blocks import text_config
from isingcut.models.replay import BLOCK_STREAMS, Replay
from isingcut.options.config import BATCH_TOKENS

_MOST_TOKENS = 16 * BATCH_TOKENS


def choose_batch_tokens(replay: Replay, memory: int) -> int:
    """Return the tokens of a micro-batch: the default on a CPU, on a GPU as many as fit.

    A larger micro-batch does not make a CPU faster. If memory runs out nevertheless, callers halve
    the micro-batch.

    Args:
        replay: a model in memory.
        memory: bytes that a micro-batch may take, on each device.
    """
    if replay.device.type == "cpu":
        return BATCH_TOKENS
    # Losses keep the original's logits.
    graph = bytes_of_backward(replay)
    logits = (
        int(text_config(replay.model).vocab_size)
        * next(replay.model.parameters()).itemsize
    )
    tokens = BATCH_TOKENS
    while 2 * tokens <= min(_MOST_TOKENS, memory // max(graph, logits)):
        tokens *= 2
    return tokens


def bytes_of_backward(replay: Replay) -> int:
    """Return the bytes of a token that a backward pass through all blocks keeps, on each device."""
    # About half the memory of running blocks.
    return len(replay) * BLOCK_STREAMS // 2 * replay.bytes_per_token // replay.devices


def count_graph_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps for the backward pass of a call, without weights."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.is_meta}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Detached, because a saved output would keep the graph that keeps it, and leak both.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = run()
    del alive
    return sum(kept.values())
