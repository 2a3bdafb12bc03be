"""The types that options share: bounds of numbers, words, and text that a reader understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.options.spellings import parse_device, parse_indices


def reads(read: Callable[[str], Any]) -> AfterValidator:
    """Text that ``read`` understands, or none."""

    def check(text: str) -> str:
        try:
            if text:
                read(text)
        except InputError as e:
            raise ValueError(f": {e}") from e
        return text

    return AfterValidator(check)


def _at_home(text: str) -> str:
    return str(user_path(text)) if text.startswith("~") else text


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Few = Annotated[int, Field(ge=2, le=1_000_000)]
Size = Annotated[int, Field(ge=1, le=2**16)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Length = Annotated[int, Field(ge=8, le=2**20)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Place = Annotated[str, AfterValidator(_at_home)]
"""A path, or something else that never begins with ``~``."""
Blocks = Annotated[str, reads(parse_indices)]
Device = Annotated[str, reads(parse_device)]
Dtype = Literal["auto", "float32", "bfloat16"]
Patch = Literal["none", "linear"]

PATCH_HELP = "linear: fold a least-squares map into the block before each cut; or none."
BATCH_TOKENS = 1024
"""Tokens computed at a time where neither an option nor a timing says another number."""
