"""The types that options share: bounds of numbers, words, and text that a reader understands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.options.spellings import parse_device

Bounds = Interval
"""The ends of a number."""


# Pydantic is imported when the first value is checked, so none of its own annotations stand here.
@dataclass(frozen=True)
class Then:
    """What a function makes of a value of the right type; it raises ValueError to refuse it."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import AfterValidator

        return AfterValidator(self.function).__get_pydantic_core_schema__(source, handler)


def reads(read: Callable[[str], Any]) -> Then:
    """Text that ``read`` understands, or none."""

    def check(text: str) -> str:
        try:
            if text:
                read(text)
        except InputError as e:
            raise ValueError(f": {e}") from e
        return text

    return Then(check)


def _at_home(text: str) -> str:
    return str(user_path(text)) if text.startswith("~") else text


Count = Annotated[int, Bounds(ge=1, le=1_000_000)]
Few = Annotated[int, Bounds(ge=2, le=1_000_000)]
Size = Annotated[int, Bounds(ge=1, le=2**16)]
Tokens = Annotated[int, Bounds(ge=1, le=2**20)]
Length = Annotated[int, Bounds(ge=8, le=2**20)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
Place = Annotated[str, Then(_at_home)]
"""A path, or something else that never begins with ``~``."""
Device = Annotated[str, reads(parse_device)]
Dtype = Literal["auto", "float32", "bfloat16"]
Patch = Literal["none", "linear", "tuned"]


def _enough(number: int) -> int:
    if 0 < number < LEAST_STATES:
        raise ValueError(f"must be 0 or at least {LEAST_STATES}, got {number}")
    return number


LEAST_STATES = 30
"""Random states that judge an energy; of fewer a correlation says little."""
RandomStates = Annotated[int, Bounds(ge=0, le=100_000), Then(_enough)]
PatchTokens = Annotated[int, Bounds(ge=64, le=2**30)]
TEXT = "wiki=0.75,python=0.25"
"""Prose and code, without a network: a patch fitted on prose alone makes code worse."""
BATCH_TOKENS = 1024
"""Tokens computed at a time where neither an option nor a timing says another number."""
