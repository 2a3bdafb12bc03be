"""Find the stack of residual blocks of any transformers decoder by its structure.

Finding it runs nothing, so a model on the meta device is enough. `skipped` lets a model run with
some blocks passing the stream through: the reference for a cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.models.architectures.base import BlockStack
from isingcut.models.architectures.kinds import describe
from isingcut.models.architectures.text_part import count_of


def text_config(model: nn.Module) -> Any:
    """The configuration of the decoder: the model's own, or its text part's.

    Raises:
        ArchitectureError: the model carries no configuration.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ArchitectureError(
            f"expected a transformers model with a config, got {type(model).__name__}"
        )
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if getter is not None else config


def find_stack(model: nn.Module) -> BlockStack:
    """The ModuleList whose items carry the residual stream, with every block described.

    The list has as many items as the decoder's config says; among several, lists inside
    the decoder win over lists outside it, then the one with most parameters wins.

    Raises:
        ArchitectureError: an encoder-decoder model, or no such list.
    """
    config = text_config(model)
    for whose, said in (("is", model.config), ("holds", config)):
        if getattr(said, "is_encoder_decoder", False):
            raise ArchitectureError(
                f"{type(model).__name__} {whose} an encoder-decoder: isingcut cuts decoders with "
                "one stack of residual blocks"
            )
    count = count_of(config)
    path = _stack_path(model, count)
    if path is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no recognisable block stack: expected one ModuleList "
            f"of {count} blocks, as its config says"
        )
    modules = list(model.get_submodule(path).children())
    blocks = tuple(
        describe(module, index, f"{path}.{index}", _of_block(config, index))
        for index, module in enumerate(modules)
    )
    return BlockStack(path=path, blocks=blocks)


def _of_block(config: Any, index: int) -> Any:
    """The configuration of one block; families like Gemma 4 have one for each."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def stack_modules(model: nn.Module, stack: BlockStack) -> list[nn.Module]:
    """The block modules of ``model``, in order.

    Raises:
        ArchitectureError: the model has no such stack (it was found on another model).
    """
    try:
        return [model.get_submodule(block.path) for block in stack.blocks]
    except AttributeError as error:
        raise ArchitectureError(
            f"{type(model).__name__} has no blocks at {stack.path!r}: {error}"
        ) from error


def _stack_path(model: nn.Module, count: int | None) -> str | None:
    if count is None:
        return None
    decoder = _decoder_path(model)
    best: tuple[bool, int, str] | None = None
    accepted: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if any(path.startswith(outer + ".") for outer in accepted):
            continue  # experts and the like: a list inside a block is not a stack
        accepted.append(path)
        inside = decoder == "" or path.startswith(decoder + ".")
        size = sum(p.numel() for p in module.parameters())
        if best is None or (inside, size) > best[:2]:
            best = (inside, size, path)
    return best[2] if best else None


def _decoder_path(model: nn.Module) -> str:
    """Where transformers says that the decoder is, or the root."""
    getter = getattr(model, "get_decoder", None)
    decoder: nn.Module | None = getter() if getter is not None else None
    if decoder is None or decoder is model:
        return ""
    return next((str(path) for path, module in model.named_modules() if module is decoder), "")


@contextmanager
def skipped(model: nn.Module, stack: BlockStack, removed: Sequence[int]) -> Iterator[None]:
    """Within the block, every removed block hands on the hidden states it was given.

    The block still runs, and only its output is replaced: caches stay consistent and the
    output keeps its form (tensor or tuple). So this is exact but saves no time.

    Raises:
        ArchitectureError: a block number that does not exist.
    """
    outside = [i for i in removed if not 0 <= i < len(stack)]
    if outside:
        raise ArchitectureError(f"blocks are 0 to {len(stack) - 1}; got {outside}")
    modules = stack_modules(model, stack)
    handles = [
        modules[i].register_forward_hook(_pass_through, with_kwargs=True) for i in sorted(removed)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_through(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, torch.Tensor):
        return hidden
    return (hidden, *output[1:])
