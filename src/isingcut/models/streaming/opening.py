"""A checkpoint opened for streaming: the model without its weights, and its blocks from disk."""

from __future__ import annotations

from pathlib import Path

from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.load import LoadedModel, load_tokenizer
from isingcut.models.streaming.buffers import Buffers
from isingcut.models.streaming.replay import StreamedReplay, open_model


def load_streamed(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    memory_limit: str = "",
    buffers: Buffers | None = None,
) -> tuple[LoadedModel, StreamedReplay]:
    """A resolved folder's model without its weights, and its blocks, each read when it is run.

    Args:
        dtype, device: as in `load`.
        memory_limit: as ``"8GB"`` or ``"50%"`` of what is free; empty takes 80 %.
        buffers: those of another streamed model, to share.

    Raises:
        ModelError: transformers cannot build it, or the checkpoint does not fit it.
        ArchitectureError: its blocks cannot be run one at a time.
        InputError: unknown dtype, device or memory limit.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    model, store, memory = open_model(
        folder,
        dtype=number,
        device=place,
        memory_limit=memory_limit,
        trust_remote_code=trust_remote_code,
        buffers=buffers,
    )
    replay = StreamedReplay(model, store, memory)
    return LoadedModel(model, tokenizer, Path(folder), number, place), replay
