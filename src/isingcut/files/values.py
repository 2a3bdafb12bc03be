"""The types of the values in documents, with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

# Limited so that squares and sums are finite too: a report scales, adds and plots these numbers.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _check_distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block appears twice")
    return blocks


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[
    list[Index], Field(max_length=2**20), AfterValidator(_check_distinct)
]
