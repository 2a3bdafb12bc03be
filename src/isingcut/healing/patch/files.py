"""Patches: new weights of single layers, in memory and as a checkpoint stores them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.files.cuts import PatchedCut
from isingcut.formats.architectures.blocks import BlockStack
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES, fp8_layout
from isingcut.formats.safetensors_files import (
    PLAIN,
    StoredTensor,
    TensorInMemory,
)
from isingcut.models.replay import Replay

_SCALES = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


class StoredLayers:
    """The patchable layers in the files of a checkpoint.

    Args:
        folder: the original, or a cut checkpoint.
        stack: the blocks of the original.
        layers: the layers that the checkpoint lacks.

    Attributes:
        tensors: all tensors of the checkpoint.
        patches: new layers, from `store`.
        replaced: new tensors with them, by name; None for the scales of a replaced float8 weight.
    """

    def __init__(
        self, folder: Path, stack: BlockStack, layers: Sequence[int] = ()
    ) -> None:
        cut = Checkpoint.read(folder)
        self.folder = folder
        self.tensors = cut.stored
        self._prefix = cut.prefix
        self.layout = fp8_layout(folder, cut.config)
        places = renumber_blocks(cut.depth + len(layers), layers)
        self.patches: Sequence[Patch] = ()
        self.replaced: dict[str, StoredTensor | None] = {}
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
            ArchitectureError: the layer is not stored under its own name and shape, or its dtype is
                neither a plain one nor float8.
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
        if dtype not in (*PLAIN, *(_FLOAT8 if self.layout else ())):
            raise ArchitectureError(
                f"{name}.weight is stored as {dtype}; a patch needs floating-point weights: "
                "use the unquantised model"
            )
        return tensors

    def store(self, patches: Sequence[Patch]) -> None:
        """Convert patches in place to the dtypes of the checkpoint, float8 to bfloat16; keep them
        and the tensors that replace those of the checkpoint, and set ``changed`` in their records.

        Raises:
            ArchitectureError: as `layer`.
        """
        new = dict[str, StoredTensor | None]()
        for patch in patches:
            own = patch.parameters
            record = patch.record
            record.changed = False
            for key, old in self.layer(patch.block, patch.path, own).items():
                dtype = old.dtype
                if dtype in _FLOAT8:
                    dtype = "BF16"
                    record.stored = "bfloat16, not quantised"  # type: ignore[attr-defined]
                    module = old.name.removesuffix("weight")
                    new |= {module + scale: None for scale in _SCALES}
                own[key] = own[key].detach().cpu().to(DTYPES[dtype]).contiguous()
                data = own[key].view(torch.uint8).numpy().reshape(-1).data
                new[old.name] = TensorInMemory(
                    old.name, old.file, dtype, old.shape, 0, len(data), data
                )
                record.changed |= old.data() != data
        self.patches = patches
        self.replaced = new

    def float8(self, block: int, path: str) -> bool:
        """Whether a layer is stored as float8, so that new weights would need more bytes."""
        name = f"{self._prefix}{self._places[block]}.{path}.weight"
        return name in self.tensors and self.tensors[name].dtype in _FLOAT8


@contextlib.contextmanager
def apply_patches(replay: Replay, patches: Sequence[Patch]) -> Iterator[None]:
    """Patch the layers of the original's blocks within the context.

    A layer of a streamed model has its new weights only during its calls, because its block is
    loaded and unloaded. One in memory has them all the time, so that a cut that is opened meanwhile
    shares them.
    """
    with contextlib.ExitStack() as undo:
        for patch in patches:
            layer = replay.blocks[patch.block].get_submodule(patch.path)
            enter, leave = _swaps(dict(patch.parameters))
            if replay.streamed:
                undo.enter_context(layer.register_forward_pre_hook(enter))
                undo.enter_context(layer.register_forward_hook(leave, always_call=True))
            else:
                enter(layer, ())
                undo.callback(leave, layer, (), None)
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
