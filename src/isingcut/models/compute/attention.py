"""Another attention of transformers' in a model, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from isingcut.errors import ArchitectureError
from isingcut.models.loading import quiet_transformers
from isingcut.models.replay import Replay
from isingcut.models.transformers_private import attention_of


@contextlib.contextmanager
def chosen_attention(replay: Replay, name: str | None = None) -> Iterator[None]:
    """Let a model compute attention as ``name``, or as its replay says, for a while.

    Raises:
        ArchitectureError: the model has no such implementation.
    """
    model, wanted = replay.model, name or replay.attention
    before = attention_of(model)
    if wanted is None or wanted == before:
        yield
        return
    reason = f"it computes it as {before!r}"
    try:
        with quiet_transformers():
            model.set_attn_implementation(wanted)  # type: ignore[operator]
    except (ValueError, ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
    if attention_of(model) != wanted:
        raise ArchitectureError(
            f"{type(model).__name__} cannot compute attention as {wanted!r} ({reason}); "
            "choose another with --attention"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
