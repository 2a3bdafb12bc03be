"""Count what transformers caches: a forward with a cache runs on the meta device, without weights.

So latents, windows, compressed entries and keys that layers share are counted as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fake_shapes
from torch.utils._python_dispatch import TorchDispatchMode

from isingcut.console.printing import say
from isingcut.errors import one_line
from isingcut.formats.architectures.blocks import BlockStack, language_model
from isingcut.formats.libraries import quiet_transformers
from isingcut.memory import raise_if_exhausted
from isingcut.models.verify import parameters

# Of the output and the argument, until transformers 5.23 and for some families by another name.
_NAMES = ("cache", "past_key_values", "cache_params", "state")
_FIELDS = ("kv_bytes_per_token", "state_bytes", "window", "kv_bytes_past_window")
# Caches that compress tokens write an entry for this many at most (DeepSeek-V4).
_STEP = 128


class _NoValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what depends on values on the meta device: nothing is found, and all tests pass."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        given: dict[str, Any] = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is aten._grouped_mm.default:
            return args[0].new_empty((len(args[0]), args[1].shape[-1]))
        # Numbers of tokens per expert as a list: the first expert gets all.
        if func is aten._to_copy.default and given.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func is aten.split_with_sizes.default and not any(args[1]):
            return [args[0].clone(), *(args[0][:0].clone() for _ in args[1][1:])]
        return func(*args, **given)


def count_cache(model: Any, stack: BlockStack) -> None:
    """Set what transformers caches for each block, in the model's dtype.

    A block that cannot be counted costs nothing, and a warning has the reason.

    Args:
        model: on the meta device; its layers are not split.
        stack: its blocks.
    """
    text = language_model(model).eval()
    layers = list(model.get_submodule(stack.path).children())
    try:
        windows, one = _cached(text, layers, 1)
        far = -(-max(windows) // _STEP) * _STEP
        lengths = (2, far, far + _STEP) if far else (2,)
        two, *beyond = (_cached(text, layers, n)[1] for n in lengths)
    except Exception as error:
        raise_if_exhausted(error)
        say(f"isingcut: warning: the cache is not counted: {one_line(error)}")
        return
    for i, block in enumerate(stack.blocks):
        block.kv_bytes_per_token = two[i] - one[i]
        block.state_bytes = 2 * one[i] - two[i]
        block.window = windows[i]
        if windows[i]:
            block.kv_bytes_past_window = (beyond[1][i] - beyond[0][i]) / _STEP


def copy_cache(source: BlockStack, target: BlockStack) -> None:
    """Copy what `count_cache` set; a split layer caches in its mixer, its first block."""
    seen = dict(zip(reversed(source.layers), reversed(source.blocks), strict=True))
    for i, block in enumerate(target.blocks):
        mixes = target.layers.index(block.layer) == i
        for name in _FIELDS:
            setattr(block, name, getattr(seen[block.layer], name) if mixes else 0)


def _cached(
    text: Any, layers: Sequence[nn.Module], tokens: int
) -> tuple[list[int], list[int]]:
    """Return the window of each layer, and the bytes that it caches of a text."""
    device = torch.device("meta")
    shapes = _NoValues()  # type: ignore[no-untyped-call]
    whole = cast(Any, fake_shapes).patch(meta_nonzero_assume_all_nonzero=True)
    with quiet_transformers(), whole, shapes, device:
        cache = fill_cache(text, torch.zeros(1, tokens, dtype=torch.long))
    parts = list(getattr(cache, "layers", ()))
    windows = []
    sizes = []
    for layer in layers:
        modules = list(layer.modules())
        # The number of a layer is not that of its cache if it has several.
        numbered = [m for m in modules[1:] if hasattr(m, "layer_idx")] or [layer]
        places = {getattr(m, "layer_idx", None) for m in numbered}
        own = [part for i, part in enumerate(parts) if i in places]
        # RecurrentGemma caches in its modules.
        kept = tensors_on(modules)
        windows.append(max((getattr(p, "sliding_window", 0) for p in own), default=0))
        sizes.append(size_of([own, kept]))
    # What names no layer belongs to all that hold nothing, in equal parts.
    empty = [i for i, size in enumerate(sizes) if not size]
    rest = size_of([cache]) - sum(sizes) if empty else 0
    for i in empty:
        sizes[i] = max(rest, 0) // len(empty)
    return windows, sizes


@torch.no_grad()
def fill_cache(text: Any, ids: Tensor) -> Any:
    """Run a model on tokens (1, T); return its own cache, without that of cross-attention."""
    from transformers import DynamicCache

    output = text(input_ids=ids, use_cache=True, return_dict=True)
    name = next((name for name in _NAMES if name in output), None)
    if name is not None:
        return getattr(output[name], "self_attention_cache", output[name])
    # Some make none themselves; `generate` gives them one.
    cache = DynamicCache(config=text.config)
    taken = [name for name in _NAMES[:2] if name in parameters(text.forward)]
    if taken:
        text(input_ids=ids, use_cache=True, **{taken[0]: cache})
    return cache


def tensors_on(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the tensors that modules hold beside parameters and buffers."""
    return [v for m in modules for v in vars(m).values() if isinstance(v, Tensor)]


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in an object."""
    return sum(t.nbytes for t in {id(t): t for t in _tensors(value)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value][: value.ndim]
        return
    inside = getattr(value, "__dict__", value)
    if isinstance(inside, dict):
        inside = list(inside.values())
    for item in inside if isinstance(inside, (list, tuple)) else ():
        yield from _tensors(item)
