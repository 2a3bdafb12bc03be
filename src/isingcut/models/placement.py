"""Place a model over several devices: a run of blocks on each, in order.

The embedding is on the first device; the norm after the blocks and the output head are on the last
one, or on the first if the head is tied to the embedding. Each part of the model moves its inputs
to its own device, so that a forward pass, `generate` and a backward pass need no other changes.
"""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isingcut.formats.architectures.blocks import find_stack, language_model
from isingcut.models.device import allowance


def places_of(model: Any) -> dict[str, torch.device]:
    """Return the device of each part of a model, by name; empty for a model on one device."""
    places = getattr(model, "hf_device_map", None) or {}
    return places if len(set(places.values())) > 1 else {}


def devices_of(model: Any) -> list[torch.device]:
    """Return the devices of a model, in order."""
    return list(dict.fromkeys(places_of(model).values())) or [model.device]


def name_devices(loaded: Any) -> str:
    """Return the devices of a loaded model or replay as text, in the form that `load` takes."""
    several = dict.fromkeys(places_of(loaded.model).values())
    return ",".join(map(str, several or [loaded.device]))


def split_evenly(sizes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Return the index of the device of each part; adjacent parts stay together.

    Args:
        sizes: bytes of the parts, in order; the first is on the first device, the last on the last.
        rooms: free bytes of each device; the parts are divided in proportion to these.
    """
    ends = np.cumsum(rooms, dtype=np.float64) / np.sum(rooms, dtype=np.float64)
    middles = (np.cumsum(sizes) - np.asarray(sizes) / 2) / np.sum(sizes)
    last = len(rooms) - 1
    between = np.minimum(np.searchsorted(ends, middles[1:-1]), last).tolist()
    return [0, *between, last]


def place(
    model: Any, devices: Sequence[torch.device], limit: str = ""
) -> dict[str, torch.device]:
    """Return the device of each part of a model: blocks, modules after them, and "" for the rest.

    Args:
        model: the model; it may be on the meta device.
        devices: devices to use.
        limit: memory limit of each device, as in `allowance`.
    """
    stack = find_stack(model)
    text = language_model(model)
    head = text.get_output_embeddings()
    tied = head is None or head.weight is text.get_input_embeddings().weight
    names = {id(module): name for name, module in model.named_modules()}
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    siblings = list(owner.children())
    after = siblings[siblings.index(model.get_submodule(stack.path)) + 1 :]
    # Norms are the modules after the blocks that have only vectors as parameters.
    last = [m for m in after if {p.dim() for p in m.parameters()} == {1}]
    last += [] if head is None else [head]
    behind = [names[id(module)] for module in last]
    blocks = list(dict.fromkeys(block.path for block in stack.blocks))
    inner = [_bytes(model.get_submodule(path)) for path in blocks]
    end = 0 if tied else sum(map(_bytes, last))
    rooms = [allowance(limit, device).left for device in devices]
    # Blocks may share tensors.
    begin = max(0, _bytes(model) - sum(inner) - end)
    where = split_evenly([begin, *inner, end], rooms)
    places = dict(zip(["", *blocks], (devices[i] for i in where), strict=False))
    return places | dict.fromkeys(behind, devices[0 if tied else -1])


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def place_of(name: str, places: Mapping[str, torch.device]) -> torch.device:
    """Return the device of a module or tensor of a placed model."""
    return places[_part_of(name, places)]


def _part_of(name: str, places: Mapping[str, torch.device]) -> str:
    while name not in places:
        name = name.rpartition(".")[0]
    return name


def connect(model: Any, places: Mapping[str, torch.device]) -> None:
    """Move each part of a model to its device, and make it move its inputs there.

    A tensor that is shared by parts on several devices is copied to each.
    """
    known = dict[Any, Any]()
    for path, module in model.named_modules() if places else ():
        part = _part_of(path, places)
        homes = (module._parameters, module._buffers)
        for home in homes:
            home.update(move({**home}, places[part], known))
        # Outside the blocks, each module that has tensors may be called after the blocks.
        if part == path != "" or (not part and any(homes)):
            module.__dict__["forward"] = _moving(module.forward, places[part])
    if places:
        # An attribute of transformers, whose Trainer does not move a model that has it.
        model.hf_device_map = dict(places)


def _moving(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    @wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        return forward(*move(args, device), **move(kwargs, device))

    return moved


def move(value: Any, device: torch.device, known: dict[Any, Any] | None = None) -> Any:
    """Return a value with its tensors on a device, also those in tuples, lists and dictionaries.

    Args:
        known: tensors that were moved before, to use again. If None, dictionaries are changed in
            place, because a block may write there for a later one.
    """
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        key = (id(value), device)
        seen = {} if known is None else known
        if key not in seen:
            # The original is kept, so that its id is not used again.
            seen[key] = value, as_parameter(value.to(device), value)
        return seen[key][1]
    if isinstance(value, UserDict):
        move(value.data, device, known)
    elif isinstance(value, dict):
        moved = {name: move(part, device, known) for name, part in value.items()}
        if known is not None:
            return moved
        value.update(moved)
    elif type(value) in (tuple, list):
        return type(value)(move(part, device, known) for part in value)
    return value


def as_parameter(value: Tensor, like: Tensor) -> Tensor:
    """Return a value as a parameter if ``like`` is one."""
    if not isinstance(like, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=like.requires_grad)
