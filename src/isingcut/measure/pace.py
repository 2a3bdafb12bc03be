"""How many micro-batches go through a block each time it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isingcut.data.tokens import TokenSet
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
