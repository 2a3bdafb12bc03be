"""Decide how much to compute at a time: the size of a micro-batch, chunks of micro-batches, and
their halves after an out-of-memory error.

The results of a sample do not depend on the other samples of its micro-batch, except for rounding.
So a split after an out-of-memory error does not affect journals and other processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.formats.architectures.blocks import text_config
from isingcut.memory import is_memory_exhausted
from isingcut.models.device import BatchLimit
from isingcut.models.replay import BLOCK_STREAMS, Replay
from isingcut.options.machine import BATCH_TOKENS

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


def chunks(
    replay: Replay,
    batches: Sequence[TokenSet],
    streams: int | Sequence[int],
) -> Iterator[tuple[slice, int]]:
    """Divide micro-batches into chunks that go through the blocks together.

    For a streamed model, a chunk is as many micro-batches as fit the memory limit, so that the
    weights are read as rarely as possible; for a model in memory, it is one. Results do not depend
    on the chunks. A killed measurement loses at most one chunk.

    Args:
        streams: hidden-state tensors to keep per micro-batch, one number or one for each.

    Yields:
        the indices of a chunk, and the bytes allowed for its hidden states.

    Raises:
        InputError: the model and one micro-batch's own work leave no memory.
    """
    each = [streams] * len(batches) if isinstance(streams, int) else streams
    sizes = [
        k * replay.stream_bytes(batch) for k, batch in zip(each, batches, strict=True)
    ]
    first = 0
    while first < len(batches):
        last = first + 1
        used = sizes[first]
        room = replay.room(batches[first])
        while replay.streamed and last < len(batches):
            used = used + sizes[last]
            least = min(room, replay.room(batches[last]))
            if used > least:
                break
            last = last + 1
            room = least
        yield slice(first, last), room
        first = last


T = TypeVar("T")


class Samples(Protocol):
    """Samples that are computed together: a micro-batch, or a task on one."""

    @property
    def samples(self) -> int: ...

    @property
    def positions(self) -> int: ...

    def halves(self) -> tuple[Self, Self]: ...


Batch = TypeVar("Batch", bound=Samples)


def split_to_fit(
    limit: BatchLimit,
    batches: Sequence[Batch],
    compute: Callable[[Sequence[Batch]], list[T]],
    join: Callable[[T, T], T],
) -> list[T]:
    """Return ``compute(batches)``, one result each; after an out-of-memory error, run on halves.

    Later calls with the same limit begin with a number of tokens that fitted.

    Args:
        join: function that joins the results of the two halves of a micro-batch.

    Raises:
        Exception: the error of ``compute`` if a single sample does not fit.
    """
    can_split = len(batches) > 1 or batches[0].samples > 1
    tokens = sum(batch.positions for batch in batches)
    if tokens <= limit.tokens or not can_split:
        results = attempt(lambda: compute(batches), can_split)
        if results is not None:
            return results
        limit.tokens = tokens // 2
        limit.release()
    if len(batches) == 1:
        halves = (
            split_to_fit(limit, [half], compute, join)[0]
            for half in batches[0].halves()
        )
        return [join(*halves)]
    middle = len(batches) // 2
    return [
        result
        for part in (batches[:middle], batches[middle:])
        for result in split_to_fit(limit, part, compute, join)
    ]


def fewer_tokens_to_fit(
    limit: BatchLimit, tokens: int, least: int, compute: Callable[[int], T]
) -> T:
    """Run ``compute(tokens)``; after an out-of-memory error, again with half as many tokens.

    Args:
        tokens: number of tokens, or items, at a time.
        least: number of tokens of the longest sample.

    Raises:
        Exception: the error of ``compute`` with ``least`` tokens.
    """
    result = attempt(lambda: compute(tokens), tokens > least)
    if result is not None:
        return result
    limit.release()
    return fewer_tokens_to_fit(limit, max(least, tokens // 2), least, compute)


def attempt(compute: Callable[[], T], another: bool) -> T | None:
    """Run ``compute``; return None if memory is exhausted and there is another way."""
    try:
        return compute()
    except Exception as error:
        if not (another and is_memory_exhausted(error)):
            raise
        # Returning releases the error, and with it the frames that hold references to the tensors.
        return None
