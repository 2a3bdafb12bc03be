"""The base classes of all documents, and of the objects in them.

A pydantic model lists the keys of version 1, with types, sizes and ranges, so that code that reads
a document can rely on them. Unknown keys are allowed, so that newer files of the same version can
be read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """Return the JSON-able content, without the keys that were not set."""
        return self.model_dump(exclude_unset=True)


class Document(Strict):
    """A whole file, or the header of a file, whose ``format`` is ``isingcut-KIND``."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind
