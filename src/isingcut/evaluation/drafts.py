"""How often a model accepts the tokens that its layers for multi-token prediction (MTP) draft."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Floats
from isingcut.measure.losses import standard_error
from isingcut.models.architectures.blocks import language_model, text_config
from isingcut.models.architectures.cuts import depth, mtp_layers, read_decoder
from isingcut.models.fit import is_mtp
from isingcut.models.loading import quiet_transformers
from isingcut.models.safetensors_files import read_checkpoint, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_mtp(model: PreTrainedModel, folder: Path) -> Any | None:
    """Load the MTP layers of a checkpoint, as `generate(use_mtp=True)` of transformers does.

    Sets on ``model`` which stored tensors these are: its class knows that of released depths only.

    Returns:
        None where there are none, and where transformers has no code that runs them.
    """
    from transformers.modeling_layers import MtpModel

    text = read_decoder(read_config(folder))
    names = [name for name in read_checkpoint(folder) if is_mtp(name, text)]
    if not names or getattr(text_config(model), "num_mtp_layers", None) is None:
        return None
    if not any(is_mtp(name) for name in names):
        numbers = range(depth(text), depth(text) + mtp_layers(text))
        model._keys_to_ignore_on_load_unexpected = {rf"layers\.{i}\." for i in numbers}
    with suppress(AttributeError, RuntimeError, ValueError), quiet_transformers():
        found: Any = MtpModel.from_pretrained(language_model(model), device_map={"": model.device})
        return found.eval()
    return None


@torch.inference_mode()
def draft_acceptance(
    model: PreTrainedModel, mtp: Any, tokens: TokenSet, batch_tokens: int
) -> tuple[float, float]:
    """Measure how often the first drafted token is the one that the model itself predicts.

    Read in one forward pass: at each position the model has the true text before it, and the MTP
    layer the true next token.

    Returns:
        the share of accepted drafts, and its standard error over samples.
    """
    accepted = torch.zeros(tokens.samples, dtype=torch.float64)
    drafted = torch.zeros(tokens.samples, dtype=torch.float64)
    for batch in tokens.batches(batch_tokens):
        ids, mask = batch.input_ids.to(model.device), batch.mask.to(model.device)
        found = language_model(model)(input_ids=ids, output_hidden_states=True, use_cache=False)
        positions = torch.arange(1, ids.shape[1], device=ids.device)[None]
        hidden = mtp.forward_layer(
            0, found.hidden_states[-1][:, :-1], positions, None, input_ids=ids[:, 1:]
        )
        drafts = mtp._project_to_logits(hidden).argmax(-1)
        counted = mask[:, 1:].bool()
        equal = (drafts == found.logits[:, 1:].argmax(-1)) & counted
        accepted[batch.index] = equal.sum(1).double().cpu()
        drafted[batch.index] = counted.sum(1).double().cpu()
    counts = drafted.numpy().astype(int)
    error: Floats = standard_error(accepted.numpy()[None], counts)
    return float(accepted.sum() / drafted.sum()), float(error[0])
