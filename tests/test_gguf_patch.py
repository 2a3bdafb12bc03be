"""A patched layer in a GGUF file: packed again, its error told, everything else untouched."""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isingcut
from gguf_files import NUMBERS, named, write_gguf
from isingcut.cli.main import app
from isingcut.errors import ArchitectureError
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.gguf import Changed, changed_tensors, cut_gguf, laid_out, repacked
from isingcut.models.gguf_files import read_gguf
from isingcut.testing.tiny import tiny_checkpoint
from shared import OPTIONS
from tiny import edit_tensors

Kind = gguf.GGMLQuantizationType

pytestmark = pytest.mark.usefixtures("no_speed")
DOWN = "model.layers.1.mlp.down_proj.weight"
THEIRS = "blk.1.ffn_down.weight"


def six_bits(shape):
    """Random Q6_K, which the package gguf unpacks only: per 256 numbers 208 bytes and a scale."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (shape[0], shape[1] // 256, 210), dtype=np.uint8)
    blocks[..., 208:] = np.full(blocks.shape[:-1], 1e-4, np.float16)[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def model_and_file(folder, kind, *, turned=False):
    """A tiny llama and its GGUF file, the down-projections in one type."""
    source = tiny_checkpoint("llama", folder / "model", intermediate_size=256)
    tensors = load_file(source / "model.safetensors")
    held = named({name: value.numpy() for name, value in tensors.items()})
    for name, theirs in zip(tensors, held, strict=True):
        if "down_proj" not in name:
            continue
        if kind == Kind.Q6_K:
            packed = six_bits(held[theirs].shape)
            tensors[name] = torch.from_numpy(gguf.dequantize(packed, kind))
        else:
            packed = gguf.quantize(held[theirs], kind)
        held[theirs] = (np.ascontiguousarray(packed[::-1]) if turned else packed, kind)
    metadata = {"block_count": 6, **NUMBERS, "feed_forward_length": 256}
    write_gguf(folder / "m.gguf", metadata, held)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source, folder / "m.gguf"


def patched(source, out):
    """The model without blocks 2 and 3, other numbers in the layer before them."""
    excise(source, [2, 3], out)
    generator = torch.Generator().manual_seed(1)
    with edit_tensors(out) as tensors:
        noise = torch.randn(tensors[DOWN].shape, generator=generator) * tensors[DOWN].std()
        tensors[DOWN] = tensors[DOWN] + 0.3 * noise
    return tensors[DOWN]


@pytest.mark.parametrize(
    ("kind", "then", "most"),
    [
        (Kind.F32, Kind.F32, 0.0),
        (Kind.F16, Kind.F16, 1e-3),
        (Kind.BF16, Kind.BF16, 4e-3),
        (Kind.Q8_0, Kind.Q8_0, 1e-2),
        (Kind.Q4_0, Kind.Q4_0, 0.2),
        (Kind.Q6_K, Kind.Q8_0, 1e-2),
    ],
)
def test_the_patched_tensor_is_packed_again_and_the_others_are_untouched(
    kind, then, most, tmp_path
):
    source, file = model_and_file(tmp_path, kind)
    wanted = patched(source, tmp_path / "patched").numpy()
    layers = [(1, "mlp.down_proj")]
    changed = changed_tensors(read_gguf(file), source, tmp_path / "patched", [2, 3], layers)
    assert list(changed) == [THEIRS]
    cut_gguf(file, [2, 3], tmp_path / "plain.gguf")
    cut_gguf(file, [2, 3], tmp_path / "out.gguf", changed=changed)
    plain, out = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("plain.gguf", "out.gguf")
    )
    assert plain.keys() == out.keys()
    differ = [n for n in plain if plain[n].data.tobytes() != out[n].data.tobytes()]
    assert differ == [THEIRS]
    found = gguf.dequantize(out[THEIRS].data, out[THEIRS].tensor_type)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert error <= most
    (told,) = repacked(file, tmp_path / "out.gguf", changed, [2, 3])
    assert (told.name, told.was, told.kind) == (THEIRS, kind.name, then.name)
    assert told.error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert list(out[THEIRS].shape) == list(plain[THEIRS].shape)


def test_a_tensor_that_is_laid_out_otherwise_is_refused(tmp_path):
    source, file = model_and_file(tmp_path, Kind.Q8_0, turned=True)
    patched(source, tmp_path / "patched")
    layers = [(1, "mlp.down_proj")]
    changed = changed_tensors(read_gguf(file), source, tmp_path / "patched", [2, 3], layers)
    with pytest.raises(ArchitectureError, match=rf"stores {DOWN} differently from the .*--patch"):
        cut_gguf(file, [2, 3], tmp_path / "out.gguf", changed=changed)
    assert not (tmp_path / "out.gguf").exists()


def test_queries_of_llama_are_found_as_its_converter_lays_them_out():
    values = np.random.default_rng(0).normal(size=(2, 32, 24)).astype(np.float32)
    heads = 4
    there, wanted = (v.reshape(heads, 2, 4, 24).swapaxes(1, 2).reshape(32, 24) for v in values)
    tensor = SimpleNamespace(data=there, tensor_type=Kind.F32)
    found = laid_out(Path("m.gguf"), tensor, Changed("q", values[0], values[1]))
    assert np.array_equal(found, wanted)


def test_all_tuned_layers_are_in_the_file(tmp_path, text):
    source, file = model_and_file(tmp_path, Kind.Q8_0)
    run = tmp_path / "run"
    given = {"model": str(source), "calibration": str(text), "out": str(run), "drop": "2,3"}
    isingcut.run(**{**OPTIONS, "energy": "fisher", "remove": 2, **given})
    found = CliRunner().invoke(app, ["excise", str(run), "--gguf", str(file), "--json"])
    assert found.exit_code == 0, found.output
    patch = json.loads((run / "model" / "isingcut.json").read_text())["patch"]
    told = json.loads(found.stdout)["repacked"]
    assert len(told) == len(patch["tuning"]["layers"]) == 14
    assert max(one["error"] for one in told) < 0.01
