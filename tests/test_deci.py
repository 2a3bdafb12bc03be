"""GGUF files of models without sublayers: llama.cpp's `deci`, computed here from the file."""

import re
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from gguf_files import cut_gguf, held_by, named, write, write_packed
from isingcut.errors import InfeasibleError
from isingcut.formats.architectures.blocks import find_stack, skip_blocks
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.cutting.gguf import Changed, _interleave
from isingcut.models.packing import Packer
from isingcut.models.sublayers import check_sublayers, split_layers
from isingcut.options.config import RunConfig
from isingcut.runs.constraints import removal_rows
from isingcut.runs.context import Context
from shared import (
    ArchitectureError,
    load_json,
    parametrize,
    refuses,
    run_tiny,
)
from tiny import tiny_model

Kind = gguf.GGMLQuantizationType

pytestmark = pytest.mark.usefixtures("no_speed")


def write_model(path, family, **changes):
    """Write a tiny model as the GGUF file of a converter; return it with sublayers as blocks."""
    model = tiny_model(family, rms_norm_eps=1e-5, use_sliding_window=False, **changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape) / 4
    held = held_by(model)
    for name in held:
        if family == "llama" and re.search(r"attn_[qk]\.", name):
            held[name] = _interleave(held[name], 4)
    write(path, held, architecture=family)
    split_layers(model)
    check_sublayers(model)
    return model


def field(file, name):
    return gguf.GGUFReader(file).get_field(name).contents()


def read(path):
    """Return the tensors of a GGUF file, unpacked."""
    return {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def run_deci(path, ids):
    """Return the logits that llama.cpp computes from a `deci` file."""
    held = read(path)
    size = field(path, "deci.rope.dimension_count")
    angles = torch.outer(
        torch.arange(len(ids)), 1e4 ** -(torch.arange(0, size, 2) / size)
    )
    rotation = torch.polar(torch.ones(angles.shape), angles)[:, None]

    def apply(name, x):
        weight = held[f"{name}.weight"]
        if weight.ndim == 1:
            return functional.rms_norm(x, weight.shape, weight, 1e-5)
        return functional.linear(x, weight, held.get(f"{name}.bias"))

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(2, (-1, 2)))
        return torch.view_as_real(pairs * rotation).flatten(2)

    x = held["token_embd.weight"][ids]
    for i, heads in enumerate(field(path, "deci.attention.head_count")):
        place = f"blk.{i}"
        if heads:
            y = apply(f"{place}.attn_norm", x)
            q, k, v = (
                apply(f"{place}.attn_{n}", y).unflatten(1, (-1, size)) for n in "qkv"
            )
            parts = (y.transpose(0, 1) for y in (rotate(q), rotate(k), v))
            mixed = functional.scaled_dot_product_attention(
                *parts, is_causal=True, enable_gqa=True
            )
            x = x + apply(f"{place}.attn_output", mixed.transpose(0, 1).flatten(1))
        y = apply(f"{place}.ffn_norm", x)
        y = functional.silu(apply(f"{place}.ffn_gate", y)) * apply(f"{place}.ffn_up", y)
        x = x + apply(f"{place}.ffn_down", y)
    return apply("output", apply("output_norm", x))


@parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_llama_cpp_computes_the_model_without_its_sublayers(family, tmp_path):
    model = write_model(tmp_path / "in.gguf", family)
    out = tmp_path / "out.gguf"
    queries = model.get_parameter("model.layers.4.self_attn.q_proj.weight")
    old = queries.numpy().copy()
    queries *= 3
    new = {"blk.4.attn_q.weight": Changed("q", lambda: old, queries.numpy)}
    removed = find_stack(model).remove([0, 3, 4, 5, 6, 10])
    cut_gguf(tmp_path / "in.gguf", removed, out, changed=new)
    assert field(out, "general.architecture") == "deci"
    assert field(out, "deci.attention.head_count") == [4, 4, 0, 4, 0]
    assert field(out, "deci.attention.head_count_kv") == [2, 2, 0, 2, 0]
    # llama.cpp reads the heads' size from the first layer.
    held = read(out)
    assert not any("blk.2.attn" in name or "blk.4.attn" in name for name in held)
    ids = torch.arange(20, 50)
    with skip_blocks(model, removed.blocks):
        wanted = model(input_ids=ids[None], use_cache=False).logits[0]
    assert torch.allclose(run_deci(out, ids), wanted, atol=1e-4)


@parametrize(
    "architecture, more, words",
    [
        ("qwen3", {}, "does not compute a 'qwen3'"),
        ("qwen2", {"output.bias": np.ones(262, np.float32)}, "has no 'output.bias'"),
    ],
)
def test_what_deci_would_compute_otherwise_is_refused(
    tmp_path, architecture, more, words
):
    held = held_by(tiny_model("llama"))
    source = tmp_path / "in.gguf"
    out = tmp_path / "out.gguf"
    write(source, held | more, architecture=architecture)
    with refuses(words, ArchitectureError):
        cut_gguf(source, Removed((), (), [1]), out)
    # Without an MLP, the architecture is the same.
    cut_gguf(source, Removed((), (), (), [1]), out)
    assert field(out, "general.architecture") == architecture
    before, after = map(read, (source, out))
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")}
    assert not any(after[name].any() for name in differ)


def test_zero_bytes_are_zeros_in_every_type():
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with suppress(NotImplementedError):
            zeros = np.zeros(4 * size, np.uint8)
            dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
            assert not gguf.dequantize(zeros.view(dtype), kind).any()


def test_a_budget_counts_the_sublayers_that_leave_the_file(tmp_path):
    file = write_packed(tmp_path / "in.gguf", Kind.Q4_1)
    config = RunConfig(model=file, dtype="float32", device="cpu", units="sublayers")
    context = Context(config)
    blocks = context.describe_blocks(config.budget)
    packed = Packer(context.loaded, file).costs("", blocks.blocks)
    cut_gguf(file, context.stack.remove([4, 9]), tmp_path / "out.gguf")
    # The header of the whole file is longer.
    header = packed.size([4, 9]) - (tmp_path / "out.gguf").stat().st_size
    assert 0 <= header < 9 * 80
    # The first attention, and every MLP, stay as zeros.
    assert [size > 0 for size in packed.bytes] == [False, False, *[True, False] * 5]
    blocks.packed = packed
    for budget in ("file=1kB", "memory=1kB@64", "bytes=20%", "params=20%"):
        with refuses("stay as zeros here: give --units blocks", InfeasibleError):
            removal_rows(blocks, config.replace(budget=budget))
    assert removal_rows(blocks, config.replace(budget="kv=50%"))


def test_a_run_without_an_attention_patches_its_gguf(text, tmp_path):
    file = write_packed(tmp_path / "tiny.gguf", Kind.Q4_1)
    options = {
        "energy": "fisher",
        "remove": 2,
        "must_remove": "4,9",
        "quick": True,
    }
    run = run_tiny(file, text, tmp_path / "run", units="sublayers", **options)
    assert field(run / "model.gguf", "deci.attention.head_count") == [4, 4, 0, 4, 4, 4]
    found = load_json(run / "evaluation.json")
    # A quick run measures speed too.
    assert found.after.decode_tokens_per_second
    assert found.failed["model.gguf"].startswith(
        "model.gguf may have layers without attention"
    )
    held = read(run / "model.gguf")
    assert not held["blk.4.ffn_down.weight"].any()
    wanted = named(load_file(run / "model/model.safetensors"))
    new = {
        t.name
        for t in gguf.GGUFReader(run / "model.gguf").tensors
        if t.tensor_type == Kind.Q8_0
    }
    assert "blk.1.ffn_down.weight" in new
    assert "blk.4.ffn_down.weight" not in new
    for name in (n for n in new if "ffn" in n):
        assert (held[name] - wanted[name]).norm() <= 0.01 * wanted[name].norm()
