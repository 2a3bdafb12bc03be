"""`Replay` of a model whose blocks are read from disk when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.formats.architectures.blocks import replace_forwards, text_config
from isingcut.formats.libraries import report_missing_kernels
from isingcut.formats.sources import model_identity
from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.load import LoadedModel, load_tokenizer
from isingcut.models.replay import BLOCK_STREAMS, Replay
from isingcut.models.streaming.store import Buffers, Store


def load_streamed(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    memory_limit: str = "",
    buffers: Buffers | None = None,
    split: bool = False,
) -> LoadedModel:
    """Load a model without its weights; each block is read from disk when it runs.

    Args:
        dtype, device, split: as in `load`.
        memory_limit: as ``"8GB"`` or ``"50%"`` of the free memory; empty takes 80 %.
        buffers: buffers of another streamed model, to share.

    Raises:
        ModelError: transformers cannot build the model, or the checkpoint does not fit it.
        ArchitectureError: the blocks cannot be run one at a time.
        InputError: unknown dtype, device or memory limit.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    store = Store(
        folder,
        number,
        place,
        memory_limit,
        buffers,
        trust_remote_code=trust_remote_code,
        split=split,
    )
    replay = StreamedReplay(store)
    if place.type != "cpu":
        report_missing_kernels()
    return LoadedModel(
        store.model, tokenizer, folder, number, place, trust_remote_code, replay
    )


# Float32 copies of one sample's logits: model, reference, comparison, gradient.
_LOGITS_COPIES = 4
# Bytes for later imports, compilation and the overhead of allocators; on a GPU, at most the limit
# divided by `_SLACK_SHARE`.
_SLACK = 256 * 2**20
_SLACK_SHARE = 32


class StreamedReplay(Replay):
    """The blocks of one model on disk, to run one at a time.

    Args:
        store: the model and the store of its weights.
    """

    streamed = True
    store: Store

    def __init__(self, store: Store) -> None:
        super().__init__(store.model, store)

    def identity(self) -> dict[str, Any]:
        """Return values that identify this model, cheap to compute, for a journal's fingerprint."""
        config: Any = self.model.config
        digest = model_identity(self.store.folder)["sha256"]
        return {"model": config.to_dict(), "sha256": digest, "streamed": True}

    def tail(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Compute logits (B, T, V) from the residual stream (B, T, D) after the last block."""
        embedding = self.text.get_input_embeddings()
        stand_in = hidden.new_zeros((*input_ids.shape, embedding.weight.shape[-1]))
        with replace_forwards([embedding], [lambda *args, **kwargs: stand_in]):
            return super().tail(hidden, input_ids)

    def room(self, batch: TokenSet) -> int:
        """Return the bytes allowed for hidden states between blocks.

        Raises:
            InputError: two parts and the work on one batch leave no memory.
        """
        longest = int(batch.input_ids.shape[1])
        count = int(batch.input_ids.numel())
        vocabulary = int(text_config(self.model).vocab_size)
        # A comparison keeps the original's logits of the batch, in the model's dtype.
        logits = vocabulary * (
            _LOGITS_COPIES * 4 * longest + self.store.dtype.itemsize * count
        )
        work = BLOCK_STREAMS * self.stream_bytes(batch) + logits
        parts = 2 * self.store.buffers.size + self.store.resident
        memory = self.store.memory
        on_cpu = self.device.type == "cpu"
        slack = _SLACK if on_cpu else min(_SLACK, memory.total // _SLACK_SHARE)
        room = memory.left - parts - work - slack
        if room <= 0:
            needed = memory.used + parts + work + slack
            raise InputError(
                f"the memory limit is {memory.total / 1e9:.2f} GB, but streaming this model "
                f"needs {needed / 1e9:.2f} GB before any hidden state is kept: two parts "
                f"{parts / 1e9:.2f} GB, the work on {count} tokens "
                f"{(work + slack) / 1e9:.2f} GB, the process itself {memory.used / 1e9:.2f} "
                "GB; raise --memory-limit or lower --batch-tokens"
            )
        return room
