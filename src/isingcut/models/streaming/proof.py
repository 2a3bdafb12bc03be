"""The proof of a cut when neither the original nor the cut model fits the memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isingcut.errors import CheckpointError, ModelError, VerificationError
from isingcut.models.cutting.verify import Proof, verify
from isingcut.models.loading import quiet_transformers
from isingcut.models.streaming.replay import StreamedReplay, open_model


def verify_streamed(
    source: StreamedReplay,
    removed: Sequence[int],
    out: Path,
    *,
    new_tokens: int = 3,
    trust_remote_code: bool = False,
) -> Proof:
    """What `models.cutting.verify` proves, with a block of each model in memory at a time.

    Generation reads the model for every token, so that it is short here, and of one prompt.

    Args:
        source: the original.
        removed: the blocks that ``out`` lacks.
        out: the checkpoint to prove.
        new_tokens: generated tokens compared.

    Raises:
        VerificationError: it does not load, or it computes something else.

    Complexity: the original is read twice, the cut model once and twice per new token.
    """
    try:
        with quiet_transformers():
            cut, store, _ = open_model(
                out,
                dtype=source.dtype,
                device=source.device,
                trust_remote_code=trust_remote_code,
                buffers=source.store.buffers,
            )
    except (ModelError, CheckpointError) as error:
        raise VerificationError(f"the checkpoint {out} does not load: {error}") from error
    if store.reader.unexpected:
        raise VerificationError(
            f"the checkpoint {out} reloads with unexpected keys: "
            f"{', '.join(store.reader.unexpected[:3])}"
        )
    return verify(source.model, removed, out, cut=cut, prompts=1, new_tokens=new_tokens)
