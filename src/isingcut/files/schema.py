"""The base classes of all documents and of the objects in them, and the types of their values.

A pydantic model lists the keys of a version, with types, sizes and ranges, so that code that reads
a document can rely on them. Unknown keys are allowed, so that newer files of the same version can
be read.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Limited so that squares and sums are finite too: a report scales, adds and plots these numbers.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _sort_distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block appears twice")
    return sorted(blocks)


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[list[Index], Field(max_length=2**20), AfterValidator(_sort_distinct)]


class Strict(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """Return the JSON-able content, without the keys that were not set."""
        return self.model_dump(exclude_unset=True)


class Document(Strict):
    """A whole file, or the header of a file, whose ``format`` is ``isingcut-KIND``.

    A change that older files do not fit raises the version; they are refused then.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    def __init_subclass__(cls, *, kind: str, version: int = 1) -> None:
        cls.kind = kind
        cls.version = version
