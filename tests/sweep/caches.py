"""The counted cache of a model, compared with the cache that a real forward fills."""

from isingcut.formats.architectures.blocks import language_model
from isingcut.models.cache import fill_cache, size_of, tensors_on
from isingcut.models.verify import random_tokens

# More tokens than any cache compresses into one entry.
_STEP = 128


def compare_cache(model, stack):
    """Return how the counted bytes per token differ from the real ones; empty if they do not.

    Compared are two lengths below any window, and two above.
    """

    def held(tokens):
        cache = fill_cache(language_model(model), random_tokens(model, 1, tokens))
        blocks = model.get_submodule(stack.path).modules()
        return size_of([cache, tensors_on(blocks)])

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
        more = (held(long) - held(short)) / (long - short)
        if counted != more:
            wrong.append(f"{counted} of {more} at {long} tokens")
    return ", ".join(wrong)
