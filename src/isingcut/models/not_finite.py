"""The error of a model that computes NaN or infinity: which model, and on which text."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.errors import NOT_FINITE, IsingcutError, ModelError
from isingcut.models.load import load_tokenizer

_SHOWN = 12


def not_finite(
    model: Any, what: str, ids: Sequence[int], removed: Sequence[int] = ()
) -> ModelError:
    """An error that says what of a model is not finite.

    Args:
        what: for example ``"the loss"``.
        ids: tokens of the text that it was computed on; the first few are shown, as text where the
            model's folder has a tokenizer.
        removed: blocks that it ran without.
    """
    name = getattr(model, "name_or_path", "") or type(model).__name__
    first = list(ids[:_SHOWN])
    shown: Any = first
    with contextlib.suppress(IsingcutError):
        shown = load_tokenizer(Path(name)).decode(first)
    without = f" without blocks {', '.join(map(str, removed))}" if len(removed) else ""
    return ModelError(
        f"{what} of {name}{without} is NaN or infinite on the text that begins {shown!r}; "
        + NOT_FINITE
    )
