"""The counted cache of a model, compared with the cache that a real forward fills."""

import torch

from isingcut.formats.architectures.blocks import language_model
from isingcut.models.verify import random_tokens

# More tokens than any cache compresses into one entry.
_STEP = 128
_NAMES = ("cache", "past_key_values", "cache_params", "state")


def compare_cache(model, stack):
    """Return how the counted bytes per token differ from the real ones; empty if they do not.

    Compared are two lengths below any window, and two above.
    """
    widest = max(block.window for block in stack.blocks)
    far = -(-widest // _STEP) * _STEP
    above = sum(
        b.kv_bytes_past_window if b.window else b.kv_bytes_per_token
        for b in stack.blocks
    )
    below = sum(b.kv_bytes_per_token for b in stack.blocks)
    wrong = []
    for counted, short, long in (
        (below, 2, 3),
        (above, *((far, far + _STEP) if far else (24, 40))),
    ):
        more = _held(model, stack, long) - _held(model, stack, short)
        if counted * (long - short) != more:
            wrong.append(f"{counted} of {more / (long - short)} at {long} tokens")
    return ", ".join(wrong)


def _held(model, stack, tokens):
    """Return the bytes that the blocks hold after the model read a text."""
    text = language_model(model)
    ids = random_tokens(model, 1, tokens)
    with torch.no_grad():
        done = text(input_ids=ids, use_cache=True)
        if not any(name in done for name in _NAMES):
            mask = torch.ones_like(ids)
            how = {"attention_mask": mask, "return_dict_in_generate": True}
            done = text.generate(ids, **how, max_new_tokens=1, do_sample=False)
    cache = next((done[name] for name in _NAMES if name in done), None)
    cache = getattr(cache, "self_attention_cache", cache)
    blocks = model.get_submodule(stack.path).modules()
    kept = [value for module in blocks for value in vars(module).values()]
    found = {id(t): t for t in _tensors([cache, kept])}
    return sum(t.nbytes for t in found.values())


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim else []
    if isinstance(value, torch.nn.Module):
        return []
    if hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
