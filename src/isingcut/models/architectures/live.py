"""Cut a model in memory: modules, their numbers, depth-shaped weights, then the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from isingcut.models.architectures import fields
from isingcut.models.architectures.discover import find_stack, stack_modules, text_config
from isingcut.models.architectures.names import renumbering
from isingcut.models.architectures.surgery import cut_config

_MISSING = object()


def cut_model(model: nn.Module, removed: Sequence[int]) -> nn.Module:
    """Remove blocks from a model in memory, in place; `save_pretrained` then writes it right.

    Args:
        model: any transformers decoder; changed in place and returned.
        removed: block numbers, in any order.

    Raises:
        ArchitectureError: as `cut_config`, before anything is changed.
    """
    stack = find_stack(model)
    mapping = renumbering(len(stack), removed)
    text: Any = text_config(model)
    before = text.to_dict()
    after = cut_config(before, removed)
    blocks = stack_modules(model, stack)
    parent, _, name = stack.path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    for old, new in mapping.items():
        _renumber(blocks[old], old, new)
    _undo_rescaling(owner)
    setattr(owner, name, nn.ModuleList(blocks[i] for i in mapping))
    _slice_depth_shaped(model, text.model_type, len(stack), mapping)
    _update_copies(model, before, after, mapping)
    set_config(text, before, after)
    return model


def set_config(config: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bring a live configuration object from ``before`` to ``after``, in place.

    Every submodule holds a reference to the same object, so it must not be replaced.
    """
    for key in before.keys() - after.keys():
        if key in vars(config):
            delattr(config, key)
    # Settings per block last: they are checked against the number of blocks.
    for key, value in sorted(after.items(), key=lambda item: item[0] in fields.MAPS):
        if before.get(key, _MISSING) != value and key != "transformers_version":
            setattr(config, key, value)


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in fields.LAYER_NUMBER_ATTRIBUTES:
            if isinstance(value := vars(module).get(name), int) and value == old:
                setattr(module, name, new)


def _slice_depth_shaped(
    model: nn.Module, model_type: str, count: int, mapping: dict[int, int]
) -> None:
    for rule in fields.DEPTH_SHAPED.get(model_type, ()):
        for name, parameter in list(model.named_parameters()):
            if not rule.pattern.search(name):
                continue
            width = parameter.shape[rule.axis] // count
            index = torch.cat([torch.arange(i * width, (i + 1) * width) for i in mapping])
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            data = parameter.data.index_select(rule.axis, index.to(parameter.device))
            setattr(owner, leaf, nn.Parameter(data, requires_grad=parameter.requires_grad))
            for size in ("embedding_dim",) if rule.axis == 1 else ("out_features",):
                if hasattr(owner, size):
                    setattr(owner, size, data.shape[rule.axis])


def _update_copies(
    model: nn.Module, before: dict[str, Any], after: dict[str, Any], mapping: dict[int, int]
) -> None:
    """Modules that keep their own copy of a per-layer field, or a map by block number."""
    changed = [
        (before[k], after[k])
        for k in (*fields.SLICE, *fields.INDICES)
        if isinstance(before.get(k), list) and before[k] != after.get(k)
    ]
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, list):
                for old, new in changed:
                    if value == old:
                        setattr(module, key, list(new))
                        break
            elif key in fields.PREFIX_ATTRIBUTES and isinstance(value, int):
                setattr(module, key, sum(i < value for i in mapping))
            elif key in fields.LAYER_MAP_ATTRIBUTES and isinstance(value, dict):
                setattr(module, key, {mapping[k]: v for k, v in value.items() if k in mapping})


def _undo_rescaling(owner: nn.Module) -> None:
    """RWKV halves weights by block number for inference; take that back before renumbering."""
    rescale = getattr(owner, "_rescale_layers", None)
    if rescale is not None and getattr(owner, "layers_are_rescaled", False):
        training = owner.training
        owner.train(True)
        rescale()
        owner.train(training)


def stop_rescaling(model: nn.Module) -> None:
    """Let RWKV compute without halving the stream every few blocks, from now on.

    The halving keeps half precision in range and is neutral but for the epsilon in the norms;
    it happens between the blocks, so blocks that are run one at a time would miss it.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "rescale_every", None):
        for module in model.modules():
            _undo_rescaling(module)
        config.rescale_every = 0
