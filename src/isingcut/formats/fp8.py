"""Dequantise FP8 checkpoints, one tensor at a time, to measure them.

There are three layouts of the same data: a float8 weight times a float32 scale.
`fp8` (fine-grained, as DeepSeek-V3): ``weight_scale_inv`` holds one factor per tile.
`compressed-tensors`: ``weight_scale`` holds one factor per tensor, output row or tile.
`modelopt`: ``weight_scale`` holds one factor per tensor. All factors multiply the weight.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import CheckpointError
from isingcut.files.inputs import load_json
from isingcut.formats.safetensors_files import StoredTensor, read_checkpoint

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# "x.weight" has "x.weight_scale", and fused experts' "x.up_proj" has "x.up_proj_scale".
_SCALES = ("_scale_inv", "_scale")
# Scales of activations and caches, which dequantised weights do not need.
_DROPPED = (
    "input_scale",
    "activation_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
)


def fp8_layout(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return ``"fp8"``, ``"compressed-tensors"`` or ``"modelopt"``; None if the weights are not
    FP8.

    Args:
        folder: the checkpoint, for ModelOpt's ``hf_quant_config.json``.
        config: its ``config.json``.
    """
    quantisation = _object(config.get("quantization_config"))
    method = str(quantisation.get("quant_method", ""))
    if method == "fp8":
        return "fp8"
    if method == "compressed-tensors":
        kinds = [[w.get("num_bits"), w.get("type")] for w in _groups(quantisation)]
        fits = kinds and kinds == [[8, "float"]] * len(kinds)
        return "compressed-tensors" if fits else None
    algorithm = quantisation.get("quant_algo")
    sidecar = folder / "hf_quant_config.json"
    if algorithm is None and not method and sidecar.is_file():
        content = load_json(sidecar, "the quantisation file", CheckpointError)
        algorithm = _object(_object(content).get("quantization")).get("quant_algo")
    return "modelopt" if algorithm == "FP8" else None


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the dtype of a stored tensor.

    Raises:
        CheckpointError: the dtype is not supported.
    """
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {stored.name!r} has the unsupported dtype {stored.dtype}"
        )
    return DTYPES[stored.dtype]


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read the values of one stored tensor, in its own dtype.

    Raises:
        CheckpointError: the dtype is not supported, or the file became shorter.
    """
    data = stored.data()
    dtype = torch_dtype(stored)
    if not data:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(stored.shape)


def dequantise(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """Compute weight * scale in float32, with the scale broadcast over its tile.

    Args:
        weight: (..., out, in) float8.
        scale: one number; one per output row, (out,) or (out, 1); or one per tile,
            (..., ceil(out / rows), ceil(in / columns)).
        block: (rows, columns) of a tile; None infers them from the shapes.

    Raises:
        CheckpointError: the scale has none of these shapes.
    """
    values = weight.float()
    factor = scale.float()
    if factor.numel() == 1 or factor.shape == values.shape[:1]:
        return values * factor.reshape(-1, *[1] * (values.ndim - 1))
    if factor.ndim != values.ndim or factor.shape[:-2] != values.shape[:-2]:
        raise CheckpointError(
            f"a scale of shape {list(scale.shape)} does not fit a weight of {list(weight.shape)}"
        )
    for axis in (-2, -1):
        size = values.shape[axis]
        tiles = factor.shape[axis]
        if tiles in (1, size):
            continue
        width = block[axis] if block else -(-size // tiles)
        if -(-size // width) != tiles:
            raise CheckpointError(
                f"a scale of shape {list(scale.shape)} has not one tile per {width} numbers of a "
                f"weight of {list(weight.shape)}"
            )
        factor = factor.repeat_interleave(width, dim=axis).narrow(axis, 0, size)
    return values * factor


def read_plain(
    name: str, stored: Mapping[str, StoredTensor], block: tuple[int, int] | None
) -> torch.Tensor:
    """Read one stored tensor; float8 values are multiplied by their scale, in float32.

    Raises:
        CheckpointError: a float8 weight has no scale, or the scale does not fit.
    """
    value = read_tensor(stored[name])
    if not stored[name].dtype.startswith("F8_"):
        return value
    scales = [stored[name + s] for s in _SCALES if name + s in stored]
    if not scales:
        raise CheckpointError(
            f"the float8 tensor {name!r} has no scale; get the checkpoint again"
        )
    return dequantise(value, read_tensor(scales[0]), block)


def dequantise_checkpoint(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the dequantised value of each tensor of an FP8 checkpoint.

    Args:
        folder: folder of the checkpoint.
        config: its ``config.json``.
        dtype: dtype of the dequantised, bfloat16 and float16 weights; others keep theirs.

    Raises:
        CheckpointError: a float8 weight has no scale, or the scale does not fit.
    """
    stored = read_checkpoint(folder)
    block = tile_of(config)
    for name, tensor in weights_of(stored).items():
        value = read_plain(name, stored, block)
        narrow = tensor.dtype.startswith(("F8_", "BF16", "F16"))
        yield name, value.to(dtype) if narrow else value


def weights_of(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors without the scales of FP8 weights, activations and caches."""
    scales = {name + s for name in stored for s in (*_SCALES, "_activation_scale")}
    return {
        name: tensor
        for name, tensor in stored.items()
        if name.rpartition(".")[2] not in _DROPPED and name not in scales
    }


def tile_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (rows, columns) of a tile with one scale; None if the configuration has none.

    Raises:
        CheckpointError: the configuration has something other than two positive whole numbers.
    """
    quantisation = _object(config.get("quantization_config"))
    sizes = quantisation.get("weight_block_size")
    for weights in _groups(quantisation):
        sizes = sizes or weights.get("block_structure")
    if sizes is None:
        return None
    whole = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
    if whole and len(sizes) == 2:
        return sizes[0], sizes[1]
    raise CheckpointError(
        f"the config's quantisation has tiles of {sizes!r}; expected two positive whole numbers"
    )


def _groups(quantisation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how each group of weights of a compressed-tensors checkpoint is packed."""
    groups = _object(quantisation.get("config_groups")).values()
    return [_object(_object(group).get("weights")) for group in groups]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
