"""A patched layer of an FP8 checkpoint: stored in bfloat16 and listed as not quantised.

Its scales go; all other tensors keep their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from isingcut.models.fp8 import fp8_layout
from isingcut.models.safetensors_files import (
    INDEX,
    SINGLE,
    NewTensor,
    StoredTensor,
    read_checkpoint,
    read_config,
    read_header,
    write_file,
)

_LISTS = {
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "modelopt": "exclude_modules",
}
_BESIDE = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_MODELOPT = "hf_quant_config.json"


def replace_float8(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Put plain weights in the place of float8 ones.

    Args:
        folder: a checkpoint that is ours to change.
        weights: the new values of stored tensors, by their names ``MODULE.weight``, in the dtype
            that they are stored in from now on.
    """
    modules = [name.removesuffix(".weight") for name in weights]
    config = read_config(folder)
    layout = fp8_layout(folder, config)
    assert layout is not None
    stored = read_checkpoint(folder)
    dropped = {f"{module}.{scale}" for module in modules for scale in _BESIDE} & stored.keys()
    # A scale may be in another shard than its weight.
    for file in {stored[name].file for name in (*weights, *dropped)}:
        own = [t for t in stored.values() if t.file == file and t.name not in dropped]
        _rewrite(file, own, {t.name: weights[t.name] for t in own if t.name in weights})
    _note_index(folder, dropped)
    _list(folder / "config.json", config, "quantization_config", layout, modules)
    if (folder / _MODELOPT).is_file():
        told = json.loads((folder / _MODELOPT).read_text(encoding="utf-8"))
        _list(folder / _MODELOPT, told, "quantization", layout, modules)


def _rewrite(file: Path, tensors: Sequence[StoredTensor], weights: Mapping[str, Tensor]) -> None:
    """One safetensors file again, with some tensors of other values and dtypes."""
    if not tensors:
        file.unlink()
        return
    values, whole = file.with_suffix(".values"), file.with_suffix(".whole")
    save_file({name: value.contiguous() for name, value in weights.items()}, values)
    new = {t.name: t for t in read_header(values)}
    write_file(whole, [NewTensor(t.name, new.get(t.name, t)) for t in tensors], {"format": "pt"})
    values.unlink()
    whole.replace(file)


def _note_index(folder: Path, dropped: set[str]) -> None:
    if (folder / SINGLE).exists():
        return
    path = folder / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in dropped}
    files = {folder / file for file in index["weight_map"].values()}
    total = sum(tensor.size for file in files for tensor in read_header(file))
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _list(
    file: Path, whole: dict[str, Any], part: str, layout: str, modules: Sequence[str]
) -> None:
    """Name the modules among those that are not quantised, wherever such a list stands."""
    told = whole.get(part)
    if not isinstance(told, dict):
        return
    names = [n for n in _LISTS.values() if isinstance(told.get(n), list)] or [_LISTS[layout]]
    for name in names:
        # Without a list, readers leave the output head out by themselves; with one they do not.
        told[name] = [*(told.get(name) or ["lm_head"]), *modules]
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
