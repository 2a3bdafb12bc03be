"""Tiny checkpoints quantised as on hubs: FP8, int4 and MXFP4."""

import re

import torch
import yaml

from shared import save_json
from tiny import edit_config, edit_tensors, read_checkpoint

_FP8_MAX = 448.0
_TILE = 16
_GROUP = 16
# Values of FP4 (E2M1) by its three bits without the sign.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


_PLAIN = yaml.safe_load(r"""
fp8:
  weight_block_size: [16, 16]
  modules_to_not_convert: [lm_head, model.layers.0.mlp, model.layers.4.mlp]
compressed-tensors:
  config_groups:
    group_0: {weights: {num_bits: 8, type: float, strategy: channel}, targets: [Linear]}
  ignore: [lm_head, 're:.*layers\.5\.mlp.*']
modelopt:
  quant_algo: FP8
  exclude_modules: [lm_head, backbone.layers.5.mixer*, backbone.layers.12*]
""")


def quantise(folder, layout, skip=()):
    """Convert the linear weights of a checkpoint to float8 with scales."""

    def pack(name, value):
        linear = name.endswith("proj.weight") and value.ndim == 2
        if not linear or any(word in name for word in skip):
            return {name: value}
        extra = {}
        if layout == "fp8":
            rows, columns = (-(-size // _TILE) for size in value.shape)
            scale = torch.rand(rows, columns) * 0.01 + 0.005
            spread = scale.repeat_interleave(_TILE, 0).repeat_interleave(_TILE, 1)
            spread = spread[: value.shape[0], : value.shape[1]]
            extra[f"{name}_scale_inv"] = scale
        elif layout == "compressed-tensors":
            spread = value.abs().amax(1, keepdim=True) / _FP8_MAX
            extra[f"{name}_scale"] = spread
        else:
            spread = value.abs().max() / _FP8_MAX
            module = name.removesuffix(".weight")
            extra = {
                f"{name}_scale": spread,
                f"{module}.input_scale": torch.tensor(0.5),
            }
        small = (value / spread).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return {name: small, **extra}

    if layout == "modelopt":
        save_json(folder / "hf_quant_config.json", {"quantization": _PLAIN[layout]})
        _rewrite(folder, pack)
    else:
        _rewrite(folder, pack, {**_PLAIN[layout], "quant_method": layout})


def fp8_in_tiles(folder):
    """Store experts one by one, in float8 with one scale per tile, as Qwen publishes MoE models.

    Embeddings, norms, routers and small projections are not converted; the config lists those
    that are matrices of blocks.
    """
    with edit_tensors(folder) as tensors:
        for name in list(tensors):
            head, dot, last = name.rpartition(".experts.")
            if dot and tensors[name].ndim == 3:
                tensors.update(_one_by_one(f"{head}.experts", last, tensors.pop(name)))
        kept = [
            name.removesuffix(".weight")
            for name, value in tensors.items()
            if value.ndim == 2
            and "layers." in name
            and not name.endswith("proj.weight")
        ]
    quantise(folder, "fp8", skip=("visual",))
    with edit_config(folder) as config:
        whole = ["lm_head", "model.visual.blocks.1.mlp", *sorted(kept)]
        config["quantization_config"] |= {"modules_to_not_convert": whole}


def _one_by_one(head, last, value):
    names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    return {
        f"{head}.{expert}.{name}.weight": part.contiguous()
        for expert, matrix in enumerate(value)
        for name, part in zip(names, matrix.chunk(len(names)), strict=True)
    }


_INT4 = yaml.safe_load("""
quant_method: compressed-tensors
format: pack-quantized
quantization_status: compressed
config_groups:
  group_0:
    weights: {num_bits: 4, type: int, strategy: group, group_size: 16, symmetric: true}
    targets: ['re:.*mlp.*']
ignore:
  - lm_head
  - model.layers.0.self_attn.q_proj
  - model.layers.1.self_attn.q_proj
  - model.layers.2.self_attn.q_proj
  - model.layers.3.self_attn.q_proj
  - model.layers.4.self_attn.q_proj
  - model.layers.5.self_attn.q_proj
""")


def int4(folder):
    """Pack MLPs in compressed-tensors' ``pack-quantized``: eight signed 4-bit numbers per int32."""

    def pack(name, value):
        if ".mlp." not in name or value.ndim != 2:
            return {name: value}
        module = name.removesuffix(".weight")
        groups = value.view(len(value), -1, _GROUP)
        scale = groups.abs().amax(-1) / 7
        whole = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
        whole = whole.view(len(value), -1, 8) << torch.arange(0, 32, 4)
        return {
            f"{module}.weight_packed": whole.sum(-1, dtype=torch.int64).to(torch.int32),
            f"{module}.weight_scale": scale.to(torch.bfloat16),
            f"{module}.weight_shape": torch.tensor(value.shape),
        }

    _rewrite(folder, pack, _INT4)


def mxfp4(folder):
    """Pack experts as in gpt-oss: two FP4 numbers per byte, a power of two per 32 numbers.

    Returns:
        the values that these stand for, by the model's own names.
    """
    values = {}

    def pack(name, value):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: value}
        groups = value.transpose(1, 2).reshape(value.shape[0], value.shape[2], -1, 32)
        exponent = (groups.abs().amax(-1) / 6).log2().ceil()
        scaled = groups / exponent.exp2()[..., None]
        code = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
        values[name] = (
            (_FP4[code] * scaled.sign() * exponent.exp2()[..., None])
            .view(value.shape[0], value.shape[2], -1)
            .transpose(1, 2)
        )
        code = (code + 8 * (scaled < 0)).to(torch.uint8)
        return {
            f"{name}_blocks": code[..., ::2] + 16 * code[..., 1::2],
            f"{name}_scales": (exponent + 127).to(torch.uint8),
        }

    whole = ["layers.*.self_attn", "layers.*.mlp.router", "embed_tokens"]
    names = [*(f"model.{name}" for name in whole), "lm_head"]
    _rewrite(folder, pack, {"quant_method": "mxfp4", "modules_to_not_convert": names})
    return values


def _rewrite(folder, pack, quantisation=None):
    with edit_tensors(folder) as tensors:
        for name in list(tensors):
            tensors |= pack(name, tensors.pop(name))
    if quantisation:
        with edit_config(folder) as config:
            config["quantization_config"] = quantisation


_BLOCK = re.compile(r"(?<=layers\.)\d+(?=\.)")


def assert_bytes_follow(source, out, kept):
    """Check that every kept tensor has its old bytes; return the dtypes of the new checkpoint."""
    before = read_checkpoint(source)
    after = read_checkpoint(out)
    elsewhere = re.compile("visual|mtp")
    old = {
        name: _BLOCK.sub(lambda m: str(kept[int(m.group())]), name) for name in after
    }
    for name, tensor in after.items():
        was = before[name if elsewhere.search(name) else old[name]]
        assert (tensor.dtype, tensor.shape, tensor.data()) == (
            was.dtype,
            was.shape,
            was.data(),
        )
    stays = {
        name
        for name in before
        if elsewhere.search(name)
        or not (m := _BLOCK.search(name))
        or int(m.group()) in kept
    }
    assert len(after) == len(stays)
    return {tensor.dtype for tensor in after.values()}
