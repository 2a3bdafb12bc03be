"""A part of an evaluation that fails costs its own figures, never those of the others."""

import contextlib
from collections.abc import Iterator

from isingcut.errors import one_line
from isingcut.memory import raise_if_exhausted


@contextlib.contextmanager
def note_failure(part: str, failed: dict[str, str]) -> Iterator[None]:
    """Note in ``failed`` why a part could not be measured, and go on after the context.

    Raises:
        MemoryExhaustedError: memory ran out; with fewer tokens at a time there may be enough.
    """
    try:
        yield
    except Exception as error:
        # A tokenizer, a template and a task are third-party code and may raise anything.
        raise_if_exhausted(error)
        failed[part] = one_line(error).removeprefix(f"{part}: ")
