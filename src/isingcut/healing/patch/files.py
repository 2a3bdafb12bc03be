"""Write new weights to a copy of a checkpoint: replace single tensors and keep all other bytes.

A patched layer of an FP8 checkpoint is stored in bfloat16, listed as not quantised, and loses its
scales.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.files.cuts import PatchedCut
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES, fp8_layout
from isingcut.formats.safetensors_files import (
    INDEX,
    PLAIN,
    NewTensor,
    StoredTensor,
    read_header,
    write_file,
)
from isingcut.models.replay import Replay

_LISTS = {
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "modelopt": "exclude_modules",
}
_SCALES = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_MODELOPT = "hf_quant_config.json"


_FLOAT8 = ("F8_E4M3", "F8_E5M2")


class StoredLayers:
    """The patchable layers in the files of a cut checkpoint.

    Args:
        folder: the cut checkpoint.
        removed: the removed blocks.
    """

    def __init__(self, folder: Path, removed: Sequence[int]) -> None:
        cut = Checkpoint.read(folder)
        self.folder = folder
        self.tensors = cut.stored
        self._prefix = cut.prefix
        self.layout = fp8_layout(folder, cut.config)
        self._places = renumber_blocks(cut.depth + len(removed), removed)

    def layer(
        self, block: int, path: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[StoredTensor, StoredTensor | None]:
        """Find the stored weight and bias of one layer.

        Args:
            block: number of the block in the original.
            path: name of the layer inside the block.
            weight, bias: the layer's weight and bias in memory.

        Raises:
            ArchitectureError: the layer is not stored under its own name and shape, or its dtype is
                neither a plain one nor float8.
        """
        name = f"{self._prefix}{self._places[block]}.{path}"
        own = self.tensors.get(f"{name}.weight")
        offset = self.tensors.get(f"{name}.bias")
        if (
            own is None
            or own.shape != tuple(weight.shape)
            or (offset is None) != (bias is None)
        ):
            raise ArchitectureError(
                f"the checkpoint {self.folder} has no {name}.weight of shape {list(weight.shape)}, "
                "as the model in memory has, so a patch cannot be written; heal by distillation"
            )
        if own.dtype not in (*PLAIN, *(_FLOAT8 if self.layout else ())):
            raise ArchitectureError(
                f"{name}.weight is stored as {own.dtype}; a patch needs floating-point weights: "
                "use the unquantised model"
            )
        return own, offset

    def float8(self, block: int, path: str) -> bool:
        """Whether a layer is stored as float8, so that new weights would need more bytes."""
        found = self.tensors.get(f"{self._prefix}{self._places[block]}.{path}.weight")
        return found is not None and found.dtype in _FLOAT8


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
    new: dict[str, Tensor] = {}
    modules = []
    written = []
    for patch in patches:
        pair = stored.layer(patch.block, patch.path, patch.weight, patch.bias)
        own = {
            tensor.name: values.detach()
            .cpu()
            .to(DTYPES[tensor.dtype] if tensor.dtype not in _FLOAT8 else torch.bfloat16)
            .contiguous()
            for tensor, values in zip(pair, (patch.weight, patch.bias), strict=True)
            if tensor is not None and values is not None
        }
        new |= own
        if pair[0].dtype in _FLOAT8:
            modules.append(pair[0].name.removesuffix(".weight"))
            patch.record.stored = "bfloat16, not quantised"  # type: ignore[attr-defined]
        patch.record.changed = any(
            stored.tensors[name].data() != values.view(torch.uint8).numpy().tobytes()
            for name, values in own.items()
        )
        weight, *bias = own.values()
        written.append(replace(patch, weight=weight, bias=bias[0] if bias else None))
    dropped = {
        f"{m}.{scale}" for m in modules for scale in _SCALES
    } & stored.tensors.keys()
    # A scale may be in another shard than its weight.
    files = {stored.tensors[name].file for name in (*new, *dropped)}
    skip = shutil.ignore_patterns(*(file.name for file in files))
    with atomic_folder(out) as temporary:
        shutil.copytree(stored.folder, temporary, dirs_exist_ok=True, ignore=skip)
        values = temporary / "values"
        # Not by `save_file` of safetensors, which hides errors of the operating system.
        values.write_bytes(save(new))
        fresh = {t.name: t for t in read_header(values)}
        for file in files:
            kept = [
                NewTensor(t.name, fresh.get(t.name, t))
                for t in stored.tensors.values()
                if t.file == file and t.name not in dropped
            ]
            if kept:
                write_file(temporary / file.name, kept)
        values.unlink()
        if stored.layout and modules:
            _list_plain(temporary, stored.layout, modules, dropped)
    return written


def _list_plain(
    folder: Path, layout: str, modules: Sequence[str], dropped: set[str]
) -> None:
    """List modules of a float8 checkpoint as not quantised, and drop their scales in the index."""
    _list(folder / "config.json", "quantization_config", layout, modules)
    if (folder / _MODELOPT).is_file():
        _list(folder / _MODELOPT, "quantization", layout, modules)
    path = folder / INDEX
    if not path.exists():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {
        k: v for k, v in index["weight_map"].items() if k not in dropped
    }
    files = {folder / file for file in index["weight_map"].values()}
    total = sum(tensor.size for file in files for tensor in read_header(file))
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _list(file: Path, part: str, layout: str, modules: Sequence[str]) -> None:
    """Add the modules to every list of modules that are not quantised."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    content = whole.get(part)
    if not isinstance(content, dict):
        return
    names = [n for n in _LISTS.values() if isinstance(content.get(n), list)] or [
        _LISTS[layout]
    ]
    for name in names:
        # Without a list, loaders exclude the output head by default; with a list they do not.
        given = content.get(name)
        content[name] = [*(["lm_head"] if given is None else given), *modules]
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


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
            new = {"weight": patch.weight} | (
                {} if patch.bias is None else {"bias": patch.bias}
            )
            enter, leave = _swaps(new)
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
        weight: new weight (D, F), or (F, D) for a transposed layer. On the CPU, in float64 if
            fitted, float32 if tuned, or in the stored dtype.
        bias: new bias (D,); None for a layer without one.
        record: the record of the fit.
    """

    block: int
    path: str
    weight: Tensor
    bias: Tensor | None
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
            stored.layer(block, path, weight, module.bias)
        except ArchitectureError as refusal:
            return str(refusal)
    return ""
