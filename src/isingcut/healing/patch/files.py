"""Write new weights to a copy of a checkpoint: replace single tensors and keep all other bytes.

A patched layer of an FP8 checkpoint is stored in bfloat16, listed as not quantised, and loses its
scales.
"""

from __future__ import annotations

import contextlib
import json
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
from isingcut.files.inputs import load_json
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures.blocks import BlockStack
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES, fp8_layout
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

_LISTS = {
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "modelopt": "exclude_modules",
}
_SCALES = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_CONFIGS = {
    "config.json": "quantization_config",
    "hf_quant_config.json": "quantization",
}
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


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
        self.layout = fp8_layout(folder, cut.config)
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

    def float8(self, block: int, path: str) -> bool:
        """Whether a layer is stored as float8, so that new weights would need more bytes."""
        name = f"{self._prefix}{self._places[block]}.{path}.weight"
        return name in self.tensors and self.tensors[name].dtype in _FLOAT8


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
    modules = list[str]()
    written = list[Patch]()
    for patch in patches:
        tensors = stored.layer(patch.block, patch.path, patch.parameters)
        own = dict[str, Tensor]()
        for key, tensor in tensors.items():
            plain = "BF16" if tensor.dtype in _FLOAT8 else tensor.dtype
            values = patch.parameters[key].detach().cpu().to(DTYPES[plain]).contiguous()
            own[key] = new[tensor.name] = values
        patch.record.changed = any(
            tensor.data() != own[key].view(torch.uint8).numpy().tobytes()
            for key, tensor in tensors.items()
        )
        if tensors["weight"].dtype in _FLOAT8:
            modules.append(tensors["weight"].name.removesuffix(".weight"))
            patch.record.stored = "bfloat16, not quantised"  # type: ignore[attr-defined]
        written.append(replace(patch, parameters=own))
    dropped = {f"{module}.{scale}" for module in modules for scale in _SCALES}
    files = [file.name for file in weight_files(stored.folder)]
    skip = shutil.ignore_patterns(*files, INDEX)
    with atomic_folder(out) as temporary:
        shutil.copytree(stored.folder, temporary, dirs_exist_ok=True, ignore=skip)
        values_file = temporary / "values"
        # Not by `save_file` of safetensors, which hides errors of the operating system.
        values_file.write_bytes(save(new))
        fresh = {t.name: t for t in read_header(values_file)}
        kept = [
            NewTensor(t.name, fresh.get(t.name, t))
            for t in stored.tensors.values()
            if t.name not in dropped
        ]
        write_checkpoint(temporary, kept)
        values_file.unlink()
        if stored.layout and modules:
            list_plain(temporary, stored.layout, modules)
    return written


def list_plain(folder: Path, layout: str, modules: Sequence[str]) -> None:
    """Add modules to every list of a float8 checkpoint of modules that are not quantised."""
    for name, part in _CONFIGS.items():
        file = folder / name
        content = load_json(file, "the configuration") if file.is_file() else {}
        settings = content.get(part)
        if not isinstance(settings, dict):
            continue
        given = [key for key in _LISTS.values() if isinstance(settings.get(key), list)]
        for key in given or [_LISTS[layout]]:
            # Without a list, loaders exclude the output head by default; with a list they do not.
            listed = settings.get(key)
            settings[key] = [*(["lm_head"] if listed is None else listed), *modules]
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
