"""Split the layers of a model, so that its blocks are sublayers: attention (or another mixer), MLP.

A sublayer runs its layer's own forward while the modules of the other sublayer give zeros. So the
model, its tensors and their names stay as they are, and everything that runs blocks runs sublayers.
Run one after the other, the two must give exactly what the layer gives. Layers of which this is not
true (parallel attention, an output that is scaled) are refused.

A removed sublayer stays in the checkpoint as zeros, because transformers has no layers without
attention or MLP. A layer without both is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isingcut.errors import ArchitectureError
from isingcut.formats.architectures.blocks import (
    Sublayer,
    blocks_in,
    catch_text_errors,
    find_mixers,
    find_stack,
    language_model,
    layer_config,
    layer_modules,
    replace_forwards,
    stack_modules,
    tensor_prefixes,
    text_config,
)
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.transformers_private import Names
from isingcut.memory import raise_if_exhausted

_BLOCKS = "pass --units blocks"
# How the classes end that form what a sublayer reads or gives, and give nothing themselves.
_FRAME = ("Norm", "Residual", "HyperConnection", "ShortConvolution")


def split_layers(model: Any) -> None:
    """Make the sublayers of each layer that has two the model's blocks; others stay blocks.

    Raises:
        ArchitectureError: no layer has two sublayers.
    """
    config = text_config(model)
    layers = layer_modules(model)
    for i, layer in enumerate(layers):
        mixers = list[str]()
        others = list[str]()
        for name, child in layer.named_children():
            if find_mixers(child, i, layer_config(config, i)):
                mixers.append(name)
            elif not type(child).__name__.endswith(_FRAME) and any(
                p.ndim > 1 for p in child.parameters()
            ):
                others.append(name)
        if mixers and others:
            layer.__dict__["sublayers"] = [
                Sublayer(layer, own, [layer.get_submodule(name) for name in muted])
                for own, muted in ((mixers, others), (others, mixers))
            ]
            layer.__dict__["forward"] = _run_each(layer.__dict__["sublayers"])
    if len(stack_modules(model)) == len(layers):
        raise ArchitectureError(
            f"the layers of {type(model).__name__} have no two sublayers; {_BLOCKS}"
        )


def _run_each(sublayers: list[Sublayer]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        rest = dict(kwargs)
        output, *others = args or (rest.pop("hidden_states"),)
        for sublayer in sublayers:
            hidden = output if isinstance(output, Tensor) else output[0]
            output = sublayer(hidden, *others, **rest)
        return output

    return forward


def check_sublayers(model: Any) -> None:
    """Run four tokens to learn the form of the sublayers' outputs, and compare with the layers.

    Raises:
        ArchitectureError: the sublayers of a layer together do not give what the layer gives, or
            the model does not run on text alone.
    """
    layers = [layer for layer in layer_modules(model) if len(blocks_in(layer)) > 1]
    text = language_model(model)
    ids = torch.arange(4, device=model.device)[None]
    comparing = replace_forwards(layers, [_compare(layer) for layer in layers])
    with torch.no_grad(), catch_text_errors(model), comparing:
        text(input_ids=ids, use_cache=False)


def _compare(layer: nn.Module) -> Callable[..., Any]:
    sublayers: Any = blocks_in(layer)
    run = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Few modules add to the stream themselves, and to find them takes memory.
        for zeroed in (False, True):
            whole = _learn_forms(sublayers, zeroed, args, kwargs)
            try:
                if _same(run(*args, **kwargs), whole):
                    return whole
            except (AttributeError, LookupError, RuntimeError, TypeError) as error:
                raise_if_exhausted(error)
        raise ArchitectureError(
            f"{type(layer).__name__} is not its sublayers one after the other (parallel attention, "
            f"or a norm or scale of their sum), so they cannot be removed alone; {_BLOCKS}"
        )

    return forward


def _learn_forms(
    sublayers: Sequence[Sublayer], zeroed: bool, args: Any, kwargs: Any
) -> Any:
    """Run a whole layer and set its sublayers' `forms`.

    Args:
        zeroed: whether to run the modules also with zeros as their numbers.
    """
    forms: dict[nn.Module, tuple[Any, int | None]] = {}

    def learn(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        hooks[module].remove()
        equal = list[int]()
        if zeroed:
            zeros = {k: torch.zeros_like(v) for k, v in module.state_dict().items()}
            rest = functional_call(module, zeros, given, named)
            equal = [i for i, v in enumerate(given) if _same(v, rest) and v.any()]
        forms[module] = output, next(iter(equal), None)

    hooks = {
        module: module.register_forward_hook(learn, with_kwargs=True)
        for sublayer in sublayers
        for module in sublayer.muted
    }
    whole = sublayers[0].whole(*args, **kwargs)
    for hook in hooks.values():
        hook.remove()
    for sublayer in sublayers:
        sublayer.muted = [module for module in sublayer.muted if module in forms]
        sublayer.forms = [forms[module] for module in sublayer.muted]
    return whole


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs of modules begin with equal tensors."""
    this, that = (v[0] if isinstance(v, (list, tuple)) else v for v in (one, other))
    return (
        isinstance(this, Tensor)
        and this.shape == that.shape
        and torch.equal(this, that)
    )


def find_removed(seen: Checkpoint, model: Any, blocks: Collection[int]) -> Removed:
    """Return the state without these blocks, with the stored tensors that become zeros.

    Args:
        seen: the model's checkpoint.
    """
    stack = find_stack(model)
    removed = stack.remove(blocks)
    of_blocks = tensor_prefixes(model)
    alone = [of_blocks[i] for i in blocks if stack.layers[i] not in removed.layers]
    if not alone:
        return removed
    names = Names(model, torch.float32)
    prefixes = tuple(itertools.chain.from_iterable(alone))
    zeroed = {n for n in seen.stored if names.target(n)[0].startswith(prefixes)}
    return replace(removed, zeroed=zeroed)
