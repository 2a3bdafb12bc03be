"""Put new weights into a copy of a checkpoint: single tensors replaced, other bytes kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.files.writing import atomic_folder
from isingcut.models.architectures.names import renumbering
from isingcut.models.architectures.surgery import depth, written_out
from isingcut.models.checkpoint.read import PLAIN, StoredTensor, read_checkpoint, read_config
from isingcut.models.fit import block_prefix
from isingcut.models.fp8 import DTYPES

RECORD = "isingcut.json"


def stored_layers(folder: Path, removed: Sequence[int], patches: Sequence[Patch]) -> list[Any]:
    """Where a cut checkpoint keeps the layers of the patches: (weight, bias or None) each.

    Raises:
        ArchitectureError: a layer is not there under its own name, or not as plain numbers.
    """
    stored = read_checkpoint(folder)
    text = written_out(read_config(folder))
    kept = depth(text)
    mapping = renumbering(kept + len(removed), removed)
    prefix = block_prefix(stored.values(), kept)
    found = []
    for patch in patches:
        name = f"{prefix}{mapping[patch.block]}.{patch.path}"
        weight, bias = stored.get(f"{name}.weight"), stored.get(f"{name}.bias")
        shape = tuple(patch.weight.shape)
        if weight is None or weight.shape != shape or (bias is None) != (patch.bias is None):
            raise ArchitectureError(
                f"the checkpoint {folder} does not hold {name}.weight of shape {list(shape)}: it "
                "names or packs its tensors differently from the model in memory, so that a patch "
                "cannot be written; heal by distillation instead"
            )
        if weight.dtype not in PLAIN:
            raise ArchitectureError(
                f"{name}.weight is stored as {weight.dtype}; a patch needs plain floating-point "
                "weights: use the unquantised model"
            )
        found.append((weight, bias))
    return found


def as_stored(patch: Patch, layers: tuple[StoredTensor, StoredTensor | None]) -> Patch:
    """The patch rounded to the dtypes it is stored in."""
    weight, bias = layers
    rounded = patch.weight.to(DTYPES[weight.dtype])
    offset = None
    if bias is not None and patch.bias is not None:
        offset = patch.bias.to(DTYPES[bias.dtype])
    return Patch(patch.block, patch.path, rounded, offset, patch.record)


def write_patched(
    folder: Path, removed: Sequence[int], patches: Sequence[Patch], out: Path
) -> list[Patch]:
    """A copy of a cut checkpoint with the patched layers; the others keep their bytes.

    Args:
        folder: the cut checkpoint.
        removed: what it lacks.
        out: the new folder.

    Returns:
        the patches as they are stored; their records say whether anything changed.

    Raises:
        ArchitectureError: as `stored_layers`; nothing was written.
        OutputExistsError: ``out`` is there.
    """
    layers = stored_layers(folder, removed, patches)
    rounded = [as_stored(p, pair) for p, pair in zip(patches, layers, strict=True)]
    with atomic_folder(out) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        for patch, (weight, bias) in zip(rounded, layers, strict=True):
            changed = _overwrite(temporary, weight, patch.weight)
            if bias is not None and patch.bias is not None:
                changed = _overwrite(temporary, bias, patch.bias) or changed
            patch.record["changed"] = changed
    return rounded


def _overwrite(folder: Path, tensor: StoredTensor, values: Tensor) -> bool:
    """Put new values into the copy of a stored tensor; whether any byte is another now."""
    data = values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    assert len(data) == tensor.size
    path = folder / tensor.file.name
    path.chmod(path.stat().st_mode | 0o200)
    with path.open("r+b") as f:
        f.seek(tensor.start)
        f.write(data)
    return tensor.data() != data


@contextlib.contextmanager
def applied(blocks: Sequence[nn.Module], patches: Sequence[Patch]) -> Iterator[None]:
    """The original's blocks with the patched layers in place while the context lasts."""
    before: list[tuple[Any, Tensor, Tensor | None]] = []
    try:
        for patch in patches:
            layer: Any = blocks[patch.block].get_submodule(patch.path)
            bias = None if layer.bias is None else layer.bias.data
            before.append((layer, layer.weight.data, bias))
            layer.weight.data = patch.weight.to(layer.weight)
            if patch.bias is not None:
                layer.bias.data = patch.bias.to(layer.bias)
        yield
    finally:
        for layer, weight, bias in before:
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias


@dataclass(frozen=True, eq=False)
class Patch:
    """New weights of one layer.

    Attributes:
        block: the kept block, by its number in the original.
        path: the layer inside the block.
        weight: (D, F) float64, or (F, D) for a transposed layer: as the layer holds it.
        bias: (D,) float64, None for a layer without one.
        record: what was fitted, JSON-able.
    """

    block: int
    path: str
    weight: Tensor
    bias: Tensor | None
    record: dict[str, Any]


def runs(removed: Sequence[int]) -> list[tuple[int, int]]:
    """The maximal runs of removed blocks, as (first, last).

    >>> runs([4, 5, 9])
    [(4, 5), (9, 9)]
    """
    found: list[tuple[int, int]] = []
    for i in sorted(removed):
        if found and i == found[-1][1] + 1:
            found[-1] = (found[-1][0], i)
        else:
            found.append((i, i))
    return found
