"""How much is computed at a time: micro-batches that go through the blocks together, and halves of
them where memory ends.

Running out of memory is an event, not a failure. What a micro-batch gives does not depend on its
other samples but for rounding, so that a journal and other processes notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

from isingcut.data.tokens import TokenSet
from isingcut.memory import is_memory_exhausted
from isingcut.models.device import BatchLimit
from isingcut.models.replay import Replay


def chunks(
    replay: Replay,
    batches: Sequence[TokenSet],
    streams: int | Sequence[int],
    *,
    together: bool | None = None,
) -> Iterator[tuple[slice, int]]:
    """Part micro-batches into chunks that go through the blocks together.

    Of a streamed model as many as fit the memory allowed, so that its weights are read as seldom
    as can be; of one in memory one at a time. Results do not depend on it. What a killed
    measurement loses is a chunk.

    Args:
        streams: residual streams that are kept of a micro-batch at a time, of all or of each.
        together: whether a chunk is more than one micro-batch; None: where the model is streamed.

    Yields:
        the places of a chunk, and the bytes that are allowed for its streams.

    Raises:
        InputError: the model and one micro-batch's own work leave no memory.
    """
    each = [streams] * len(batches) if isinstance(streams, int) else streams
    sizes = [k * replay.stream_bytes(batch) for k, batch in zip(each, batches, strict=True)]
    if together is None:
        together = replay.streamed
    first = 0
    while first < len(batches):
        last, used, room = first + 1, sizes[first], replay.room(batches[first])
        while together and last < len(batches):
            used, least = used + sizes[last], min(room, replay.room(batches[last]))
            if used > least:
                break
            last, room = last + 1, least
        yield slice(first, last), room
        first = last


T = TypeVar("T")
Item = TypeVar("Item")


class Samples(Protocol):
    """Some samples that are computed together: a micro-batch, or what is done with one."""

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
    """``compute(batches)``, one result each; where memory ends, of half of it at a time.

    Later calls with the same limit begin with as many tokens as fitted.

    Args:
        join: makes the result of a micro-batch from those of its two halves.

    Raises:
        Exception: what ``compute`` raised where a single sample does not fit.
    """
    can_split = len(batches) > 1 or batches[0].samples > 1
    tokens = sum(batch.positions for batch in batches)
    if tokens <= limit.tokens or not can_split:
        found = _attempt(lambda: compute(batches), can_split)
        if found is not None:
            return found
        limit.tokens = tokens // 2
        limit.release()
    if len(batches) == 1:
        halves = (split_to_fit(limit, [half], compute, join)[0] for half in batches[0].halves())
        return [join(*halves)]
    middle = len(batches) // 2
    return [
        result
        for part in (batches[:middle], batches[middle:])
        for result in split_to_fit(limit, part, compute, join)
    ]


def halve_to_fit(
    limit: BatchLimit, items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[T]]
) -> Sequence[T]:
    """``compute(items)``, one result each; where memory ends, of half of them at a time.

    Raises:
        Exception: what ``compute`` raised where a single item does not fit.
    """
    found = _attempt(lambda: compute(items), len(items) > 1)
    if found is not None:
        return found
    limit.release()
    middle = len(items) // 2
    return [
        result
        for part in (items[:middle], items[middle:])
        for result in halve_to_fit(limit, part, compute)
    ]


def fewer_tokens_to_fit(
    limit: BatchLimit, tokens: int, least: int, compute: Callable[[int], T]
) -> T:
    """``compute(tokens)``; where memory ends, again with half as many tokens at a time.

    Args:
        least: tokens of the longest sample.

    Raises:
        Exception: what ``compute`` raised with as few tokens as a sample has.
    """
    found = _attempt(lambda: compute(tokens), tokens > least)
    if found is not None:
        return found
    limit.release()
    return fewer_tokens_to_fit(limit, max(least, tokens // 2), least, compute)


def _attempt(compute: Callable[[], T], can_split: bool) -> T | None:
    """None where memory is exhausted and less can be computed at a time."""
    try:
        return compute()
    except Exception as error:
        if not (can_split and is_memory_exhausted(error)):
            raise
        # Returning drops the error, and with it the frames that hold the tensors.
        return None
