"""Write new weights to a copy of a checkpoint: replace single tensors and keep all other bytes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.files.cuts import PatchedCut
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures.blocks import BlockStack
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES
from isingcut.formats.safetensors_files import (
    INDEX,
    PLAIN,
    NewTensor,
    StoredTensor,
    read_header,
    weight_files,
    write_checkpoint,
)
from isingcut.models.replay import Replay


class StoredLayers:
    """The patchable layers in the files of a cut checkpoint.

    Args:
        folder: the cut checkpoint.
        stack: the blocks of the original.
        removed: the removed blocks.
    """

    def __init__(self, folder: Path, stack: BlockStack, removed: Sequence[int]) -> None:
        cut = Checkpoint.read(folder)
        self.folder = folder
        self.tensors = cut.stored
        self._prefix = cut.prefix
        whole = stack.whole(removed)
        places = renumber_blocks(cut.depth + len(whole), whole)
        self._places = [places.get(layer) for layer in stack.layers]

    def layer(
        self, block: int, path: str, parameters: Mapping[str, Tensor]
    ) -> dict[str, StoredTensor]:
        """Find the stored weight and bias of one layer.

        Args:
            block: number of the block in the original.
            path: name of the layer inside the block.
            parameters: the layer's weight and bias in memory.

        Raises:
            ArchitectureError: the layer is not stored under its own name and shape, or is
                quantised.
        """
        name = f"{self._prefix}{self._places[block]}.{path}"
        names = {key: f"{name}.{key}" for key in ("weight", "bias")}
        tensors = {k: self.tensors[n] for k, n in names.items() if n in self.tensors}
        shape = parameters["weight"].shape
        same = tensors.keys() == parameters.keys()
        if not same or tensors["weight"].shape != tuple(shape):
            raise ArchitectureError(
                f"the checkpoint {self.folder} has no {name}.weight of shape {list(shape)}, "
                "as the model in memory has, so a patch cannot be written; heal by distillation"
            )
        dtype = tensors["weight"].dtype
        if dtype not in PLAIN:
            raise ArchitectureError(
                f"{name}.weight is stored as {dtype}; a patch needs floating-point weights: "
                "use the unquantised model"
            )
        return tensors


def write_patched(
    stored: StoredLayers, patches: Sequence[Patch], out: Path
) -> list[Patch]:
    """Write a copy of a cut checkpoint with the patched layers; other tensors keep their bytes.

    Args:
        stored: the cut checkpoint's layers.
        out: the new folder.

    Returns:
        the patches with weights as stored; ``changed`` is set in their records.

    Raises:
        ArchitectureError: as `StoredLayers.layer`; nothing was written.
        OutputExistsError: ``out`` exists.
    """
    new = dict[str, Tensor]()
    written = list[Patch]()
    for patch in patches:
        tensors = stored.layer(patch.block, patch.path, patch.parameters)
        own = dict[str, Tensor]()
        for key, tensor in tensors.items():
            values = patch.parameters[key].detach().cpu().to(DTYPES[tensor.dtype])
            own[key] = new[tensor.name] = values.contiguous()
        patch.record.changed = any(
            tensor.data() != own[key].view(torch.uint8).numpy().tobytes()
            for key, tensor in tensors.items()
        )
        written.append(replace(patch, parameters=own))
    files = [file.name for file in weight_files(stored.folder)]
    skip = shutil.ignore_patterns(*files, INDEX)
    with atomic_folder(out) as temporary:
        shutil.copytree(stored.folder, temporary, dirs_exist_ok=True, ignore=skip)
        values_file = temporary / "values"
        # Not by `save_file` of safetensors, which hides errors of the operating system.
        values_file.write_bytes(save(new))
        fresh = {t.name: t for t in read_header(values_file)}
        kept = [
            NewTensor(t.name, fresh.get(t.name, t)) for t in stored.tensors.values()
        ]
        write_checkpoint(temporary, kept)
        values_file.unlink()
    return written


@contextlib.contextmanager
def apply_patches(
    blocks: Sequence[nn.Module], patches: Sequence[Patch], *, resident: bool = False
) -> Iterator[None]:
    """Patch the layers of the original's blocks within the context.

    A layer has its new weights only during its calls, which also works for a streamed block, whose
    weights are loaded and unloaded.

    Args:
        resident: whether the blocks are in memory and have the new weights all the time, so that a
            cut that is opened meanwhile shares them.
    """
    with contextlib.ExitStack() as undo:
        for patch in patches:
            layer = blocks[patch.block].get_submodule(patch.path)
            enter, leave = _swaps(dict(patch.parameters))
            if resident:
                enter(layer, ())
                undo.callback(leave, layer, (), None)
            else:
                undo.callback(layer.register_forward_pre_hook(enter).remove)
                undo.callback(
                    layer.register_forward_hook(leave, always_call=True).remove
                )
        yield


def _swaps(new: dict[str, Tensor]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that give a layer new parameters, and its own ones again."""
    before: dict[str, Any] = {}

    def enter(module: nn.Module, args: Any) -> None:
        own: dict[str, Any] = module._parameters
        for name, value in new.items():
            before[name] = own[name]
            if not isinstance(value, nn.Parameter):
                new[name] = nn.Parameter(value.to(own[name]), requires_grad=False)
            own[name] = new[name]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(before)

    return enter, leave


@dataclass(frozen=True, eq=False)
class Patch:
    """New weights of one layer.

    Attributes:
        block: number of the kept block in the original.
        path: name of the layer inside the block.
        parameters: new ``weight`` (D, F), or (F, D) for a transposed layer, and ``bias`` (D,) if it
            has one. On the CPU, in float64 if fitted, float32 if tuned, or in the stored dtype.
        record: the record of the fit.
    """

    block: int
    path: str
    parameters: dict[str, Tensor]
    record: PatchedCut


def runs(removed: Sequence[int]) -> list[tuple[int, int]]:
    """Return the maximal runs of removed blocks, as (first, last).

    >>> runs([4, 5, 9])
    [(4, 5), (9, 9)]
    """
    first = sorted(i for i in removed if i - 1 not in removed)
    last = sorted(i for i in removed if i + 1 not in removed)
    return list(zip(first, last, strict=True))


def find_obstacle(
    replay: Replay, stored: StoredLayers | None, block: int, path: str, module: Any
) -> str:
    """Return the reason why a layer cannot be patched; empty if it can.

    Args:
        stored: the checkpoint to write the layer to; None: any layer is allowed.
    """
    weight = module.weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"the weights of its {path} are quantised; patch the unquantised model"
    owners = [
        name
        for name, other in replay.model.named_parameters(remove_duplicate=False)
        # Parameters of a streamed model may be views of the same place of a buffer.
        if other is weight
        or (other.shape == weight.shape and 0 != other.data_ptr() == weight.data_ptr())
    ]
    if len(owners) > 1:
        return f"its {path} is shared with another part of the model ({owners[-1]})"
    if stored is not None:
        try:
            stored.layer(block, path, dict(module.named_parameters(recurse=False)))
        except ArchitectureError as refusal:
            return str(refusal)
    return ""
