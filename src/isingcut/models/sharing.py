"""Load a cut checkpoint next to its original: equal tensors share memory.

A cut has the bytes of all kept blocks of its original. So both models together take the memory of
one, plus that of the layers that a patch changed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.formats.architectures.blocks import find_stack
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.architectures.removed import Removed
from isingcut.models.device import allowance, weight_bytes
from isingcut.models.load import LoadedModel, load
from isingcut.models.placement import as_parameter, connect, place_of, places_of
from isingcut.models.streaming.replay import load_streamed

_CHUNK_BYTES = 64 * 2**20


def open_cut(original: LoadedModel, removed: Removed, folder: Path) -> LoadedModel:
    """Load a cut checkpoint on the device of its original in memory; equal tensors share memory.

    If the checkpoint does not fit host memory, or its own tensors do not fit the device, its blocks
    are streamed.

    Raises:
        ModelError: the checkpoint cannot be loaded.
    """
    how: Any = {"dtype": original.dtype_name, "trust_remote_code": original.trusted}
    if fits(folder, original.dtype):
        cut = load(folder, device="cpu", **how)
        if share(cut.model, original.model, removed):
            return replace(cut, device=original.device)
        del cut
    return load_streamed(folder, device=str(original.device), **how)


def fits(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the weights of a checkpoint fit the memory of the host, where they are compared."""
    return weight_bytes(folder, dtype) <= allowance("", torch.device("cpu")).left


def share(cut: Any, original: Any, removed: Removed) -> bool:
    """Move a cut model to its original's devices; frozen tensors with equal bits share memory.

    Args:
        cut: the cut model, on the CPU; PEFT may have added adapters to its layers.
        original: the original, on its device or placed over several.
        removed: the state of the cut.

    Returns:
        True; False, with the cut unchanged, if tensors that are not equal do not fit a device.

    Complexity: each tensor of the cut is read once, and copied to the device in chunks.
    """
    named = _original_names(cut, original, removed)
    known = places_of(original)
    # The devices of the cut's parts are those of the same parts of the original.
    names = (name for name, _ in cut.named_modules())
    places = {name: known[named(name)] for name in names if named(name) in known}
    device = original.device
    theirs = {
        name: t for name, t in _named_tensors(original) if t.device.type == device.type
    }
    # By the id of the replaced tensor, so that tied tensors stay tied.
    placed: dict[int, Tensor] = {}
    homes: dict[int, torch.device] = {}
    for name, mine in _named_tensors(cut):
        other = theirs.get(named(name))
        if id(mine) in placed:
            continue
        placed[id(mine)] = mine
        if other is not None and not mine.requires_grad and _equal(mine, other):
            placed[id(mine)] = as_parameter(other.detach(), mine)
        elif device.type != "cpu":
            homes[id(mine)] = place_of(name, places or {"": device})
    for home in set(homes.values()):
        needed = sum(placed[key].nbytes for key in homes if homes[key] == home)
        if needed > allowance("", home).left:
            return False
    for key, home in homes.items():
        placed[key] = as_parameter(placed[key].detach().to(home), placed[key])
    for module in cut.modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, mine in tensors.items():
                if mine is not None:
                    tensors[leaf] = placed[id(mine)]
    connect(cut, places)
    return True


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors, of which one is on the CPU, have the same bits."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not (mine.is_contiguous() and theirs.is_contiguous()):
        return False
    ours, others = (x.detach().view(-1).view(torch.uint8) for x in (mine, theirs))
    return all(
        torch.equal(
            ours[a : a + _CHUNK_BYTES].to(theirs.device), others[a : a + _CHUNK_BYTES]
        )
        for a in range(0, len(ours), _CHUNK_BYTES)
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _original_names(cut: Any, original: Any, removed: Removed) -> Callable[[str], str]:
    """Return a function from the name of a tensor in the cut to its name in the original."""
    stack = find_stack(original)
    kept = renumber_blocks(stack.depth, removed.layers)
    ours = f"{find_stack(cut).path}."
    sources = {f"{ours}{new}": f"{stack.path}.{old}" for old, new in kept.items()}

    def name_source(name: str) -> str:
        name = name.replace("base_layer.", "")
        block = ours + name.removeprefix(ours).partition(".")[0]
        return name.replace(block, sources.get(block, block), 1)

    return name_source
