"""GGUF files: blocks renumbered, packed bytes kept, new values packed finely and evaluated."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import isingcut
from gguf_files import NUMBERS, WIDE, WIDE_NUMBERS, named, write, write_gguf
from isingcut.errors import ArchitectureError, CheckpointError
from isingcut.formats.cutting import gguf as gguf_cuts
from isingcut.formats.cutting.checkpoint import excise
from isingcut.formats.cutting.gguf import Changed, changed_tensors, cut_gguf, lay_out
from isingcut.formats.gguf_files import read_gguf, unpack_gguf
from isingcut.formats.sources import resolve
from isingcut.testing.tiny import tiny_checkpoint, tiny_model
from shared import OPTIONS, Bars, load_json, refuses, works
from tiny import edit_tensors


def make(
    path, architecture="llama", blocks=4, endianess=gguf.GGUFEndian.LITTLE, **extra
):
    """Write a tiny GGUF file with one packed (Q8_0) and one plain tensor per block."""
    generator = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    numbers = generator.standard_normal((blocks + 1, 8, 64)).astype(np.float32)
    held = {"token_embd.weight": numbers[-1]}
    for i in range(blocks):
        held[f"blk.{i}.ffn_up.weight"] = (gguf.quantize(numbers[i], kind), kind)
        held[f"blk.{i}.attn_norm.weight"] = numbers[i, 0]
    heads = {"attention.head_count_kv": [1 + i for i in range(blocks)]}
    metadata = {
        "block_count": blocks,
        "context_length": 128,
        **heads,
        "flag": True,
        **extra,
    }
    tokens = [b"a", b"b", b"c", b"d"]
    more = {
        "architecture": architecture,
        "more": lambda writer: writer.add_token_list(tokens),
    }
    return write_gguf(path, metadata, held, endianess=endianess, **more)


def test_blocks_are_renumbered_and_bytes_kept(tmp_path):
    source = make(tmp_path / "in.gguf", leading_dense_block_count=2)
    cut_gguf(source, [0, 2], tmp_path / "out.gguf")
    before = gguf.GGUFReader(source)
    after = gguf.GGUFReader(tmp_path / "out.gguf")
    old = {t.name: t for t in before.tensors}
    assert {t.name for t in after.tensors} == {
        "token_embd.weight",
        "blk.0.ffn_up.weight",
        "blk.0.attn_norm.weight",
        "blk.1.ffn_up.weight",
        "blk.1.attn_norm.weight",
    }
    for tensor in after.tensors:
        name = tensor.name.replace("blk.1.", "blk.3.").replace("blk.0.", "blk.1.")
        assert tensor.tensor_type == old[name].tensor_type
        assert list(tensor.shape) == list(old[name].shape)
        assert tensor.data.tobytes() == old[name].data.tobytes()
    assert after.get_field("llama.block_count").contents() == 2
    assert after.get_field("llama.attention.head_count_kv").contents() == [2, 4]
    assert after.get_field("llama.leading_dense_block_count").contents() == 1
    for key in ("llama.context_length", "tokenizer.ggml.tokens", "llama.flag"):
        assert after.get_field(key).contents() == before.get_field(key).contents()


def test_a_file_of_another_byte_order_gets_no_new_values(tmp_path):
    source = make(tmp_path / "in.gguf", endianess=gguf.GGUFEndian.BIG)
    cut_gguf(source, [0, 2], tmp_path / "out.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").endianess == gguf.GGUFEndian.BIG
    with refuses("is big-endian and this machine is not", ArchitectureError):
        cut_gguf(source, [0, 2], tmp_path / "new.gguf", packed="Q8_0")


def test_mtp_layers_behind_the_blocks_stay(tmp_path):
    source = make(tmp_path / "in.gguf", "deepseek2", blocks=5, nextn_predict_layers=2)
    cut_gguf(source, [1], tmp_path / "out.gguf")
    after = gguf.GGUFReader(tmp_path / "out.gguf")
    before = {t.name: t.data.tobytes() for t in gguf.GGUFReader(source).tensors}
    assert after.get_field("deepseek2.block_count").contents() == 4
    assert after.get_field("deepseek2.nextn_predict_layers").contents() == 2
    assert after.get_field("deepseek2.attention.head_count_kv").contents() == [
        1,
        3,
        4,
        5,
    ]
    for new, old in enumerate((0, 2, 3, 4)):
        name = "ffn_up.weight"
        tensor = next(t for t in after.tensors if t.name == f"blk.{new}.{name}")
        assert tensor.data.tobytes() == before[f"blk.{old}.{name}"]
    cut_gguf(source, [1], tmp_path / "none.gguf", drop_mtp=True)
    after = gguf.GGUFReader(tmp_path / "none.gguf")
    assert after.get_field("deepseek2.block_count").contents() == 2
    assert after.get_field("deepseek2.nextn_predict_layers").contents() == 0
    assert not any("blk.2." in t.name for t in after.tensors)
    with refuses("must be 0 to 2", ArchitectureError):
        cut_gguf(source, [3], tmp_path / "no.gguf")


def test_what_is_unknown_or_numbered_is_refused(tmp_path):
    out = tmp_path / "out.gguf"
    with refuses(r"llama\.mystery' looks per-layer", ArchitectureError):
        cut_gguf(make(tmp_path / "a.gguf", mystery=[1, 2, 3, 4]), [0], out)
    with refuses("may derive the kind of a 'cohere2'", ArchitectureError):
        cut_gguf(make(tmp_path / "b.gguf", "cohere2"), [0], out)
    with refuses("must be 0 to 3", ArchitectureError):
        cut_gguf(make(tmp_path / "d.gguf"), [4], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("architecture", "extra", "expected"),
    [
        # Of 12 blocks, 5 and 11 have no window; without 1 and 7 they are blocks 4 and 9.
        (
            "gemma3",
            {"attention.sliding_window": 8},
            [True] * 4 + [False] + [True] * 4 + [False],
        ),
        ("gemma3", {}, None),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": 4},
            [True, True, False] + [True] * 6 + [False],
        ),
        # Blocks 0, 2, ... have windows.
        (
            "gemma2",
            {},
            [True, True, False, True, False, True, True, False, True, False],
        ),
        (
            "gemma2",
            {"attention.sliding_window_pattern": [True] * 2 + [False] * 10},
            [True] + [False] * 9,
        ),
    ],
)
def test_blocks_keep_their_windows(tmp_path, architecture, extra, expected):
    source = make(tmp_path / "in.gguf", architecture, 12, **extra)
    cut_gguf(source, [1, 7], tmp_path / "out.gguf")
    after = gguf.GGUFReader(tmp_path / "out.gguf")
    field = after.get_field(f"{architecture}.attention.sliding_window_pattern")
    assert (field and field.contents()) == expected


def test_windows_that_are_neither_period_nor_list_are_refused(tmp_path):
    key = {"attention.sliding_window_pattern": [True] * 11}
    source = make(tmp_path / "in.gguf", "gemma2", 12, **key)
    with refuses("a period or one entry for each of 12 blocks", CheckpointError):
        cut_gguf(source, [1], tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("architecture", "blocks"), [("deepseek2", 27), ("gemma3", 63)]
)
def test_a_depth_that_llama_cpp_knows_a_model_by_is_refused(
    tmp_path, architecture, blocks
):
    source = make(tmp_path / "in.gguf", architecture, blocks)
    with refuses(r"computes a '\w+' of (26|62) blocks differently", ArchitectureError):
        cut_gguf(source, [0], tmp_path / "out.gguf")


Kind = gguf.GGMLQuantizationType

pytestmark = pytest.mark.usefixtures("no_speed")
DOWN = "model.layers.1.mlp.down_proj.weight"
THEIRS = "blk.1.ffn_down.weight"


def model_and_file(folder, kind, *, turned=False):
    """Write a tiny llama and its GGUF file, with the down-projections in one type."""
    source = tiny_checkpoint("llama", folder / "model", intermediate_size=256)
    tensors = load_file(source / "model.safetensors")
    held = named({name: value.numpy() for name, value in tensors.items()})
    for name in held:
        if "ffn_down" in name:
            packed = gguf.quantize(held[name], kind)
            held[name] = (
                np.ascontiguousarray(packed[::-1]) if turned else packed,
                kind,
            )
    metadata = {"block_count": 6, **NUMBERS, "feed_forward_length": 256}
    write_gguf(folder / "m.gguf", metadata, held)
    return source, folder / "m.gguf"


def patched(source, out):
    """Write the model without blocks 2 and 3 and with changed weights in the layer before them."""
    excise(source, [2, 3], out)
    generator = torch.Generator().manual_seed(1)
    with edit_tensors(out) as tensors:
        noise = (
            torch.randn(tensors[DOWN].shape, generator=generator) * tensors[DOWN].std()
        )
        tensors[DOWN] = tensors[DOWN] + 0.3 * noise
    return tensors[DOWN]


@pytest.mark.parametrize(
    ("kind", "then", "most"),
    [
        (Kind.F32, Kind.F32, 0.0),
        (Kind.Q8_0, Kind.Q8_0, 1e-2),
        (Kind.Q4_0, Kind.Q8_0, 1e-2),
    ],
)
def test_new_values_are_packed_finely_and_the_other_tensors_are_untouched(
    kind, then, most, tmp_path
):
    source, file = model_and_file(tmp_path, kind)
    wanted = patched(source, tmp_path / "patched").numpy()
    changed = changed_tensors(read_gguf(file), source, tmp_path / "patched", [2, 3])
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
    assert out[THEIRS].tensor_type == then
    found = gguf.dequantize(out[THEIRS].data, out[THEIRS].tensor_type)
    assert np.linalg.norm(found - wanted) <= most * np.linalg.norm(wanted)
    assert list(out[THEIRS].shape) == list(plain[THEIRS].shape)


def test_a_tensor_in_another_order_is_refused(tmp_path):
    source, file = model_and_file(tmp_path, Kind.Q8_0, turned=True)
    patched(source, tmp_path / "patched")
    changed = changed_tensors(read_gguf(file), source, tmp_path / "patched", [2, 3])
    with refuses(rf"stores {DOWN} differently from the .*--patch", ArchitectureError):
        cut_gguf(file, [2, 3], tmp_path / "out.gguf", changed=changed)
    assert not (tmp_path / "out.gguf").exists()


def test_queries_of_llama_are_ordered_as_its_converter_does():
    values = np.random.default_rng(0).normal(size=(2, 32, 24)).astype(np.float32)
    heads = 4
    there, wanted = (
        v.reshape(heads, 2, 4, 24).swapaxes(1, 2).reshape(32, 24) for v in values
    )
    tensor = SimpleNamespace(data=there, tensor_type=Kind.F32)
    found = lay_out(
        Path("m.gguf"), tensor, Changed("q", lambda: values[0], lambda: values[1])
    )
    assert np.array_equal(found, wanted)


def test_norms_that_a_converter_adds_one_to_get_it_too():
    values = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    tensor = SimpleNamespace(data=values[0] + 1, tensor_type=Kind.F32)
    found = lay_out(
        Path("m.gguf"), tensor, Changed("n", lambda: values[0], lambda: values[1])
    )
    assert np.array_equal(found, values[1] + 1)


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory):
    """A GGUF file of a tiny llama, the layers of its blocks in Q4_1."""
    held = named(
        {n: t.numpy() for n, t in tiny_model("llama", **WIDE).state_dict().items()}
    )
    for name, values in held.items():
        if name.startswith("blk.") and values.ndim == 2:
            held[name] = (gguf.quantize(values, Kind.Q4_1), Kind.Q4_1)
    file = tmp_path_factory.mktemp("packed") / "tiny-Q4_1.gguf"
    write(file, held, **WIDE_NUMBERS)
    return file


@pytest.fixture(scope="module")
def gguf_run(packed_model, text, tmp_path_factory):
    """A run on that file, without blocks 2 and 3, with a tuned patch."""
    run = tmp_path_factory.mktemp("gguf") / "run"
    given = {"model": packed_model, "calibration": text, "out": run}
    more = {"energy": "fisher", "remove": 2, "drop": "2,3", "skip_speed": True}
    isingcut.run(**{**OPTIONS, **more, **given})
    return run


def new_layers(card):
    """Return the layers that a card lists under "Patched", as tensor names of the original."""
    rows = re.findall(r"\| block (\d+), (`.*?) \|", card.read_text())
    layers = [
        (block, layer) for block, cell in rows for layer in re.findall(r"`(.+?)`", cell)
    ]
    assert len(layers) >= 14
    return {f"model.layers.{block}.{layer}.weight" for block, layer in layers}


def test_the_cards_of_a_cut_gguf_say_what_is_in_the_files(gguf_run, packed_model):
    kept = [0, 1, 4, 5]
    numbered = {f"layers.{new}.": f"layers.{old}." for new, old in enumerate(kept)}
    before = load_file(resolve(str(packed_model)) / "model.safetensors")
    after = load_file(gguf_run / "model/model.safetensors")
    names = {
        re.sub(r"layers\.\d+\.", lambda m: numbered[m[0]], name): name for name in after
    }
    differ = {
        old for old, new in names.items() if not torch.equal(before[old], after[new])
    }
    assert (
        "all other tensors are the original's"
        in (gguf_run / "model/README.md").read_text()
    )
    assert new_layers(gguf_run / "model/README.md") == differ

    theirs, ours = (
        {t.name: t for t in gguf.GGUFReader(file).tensors}
        for file in (packed_model, gguf_run / "model.gguf")
    )
    blocks = {f"blk.{new}.": f"blk.{old}." for new, old in enumerate(kept)}
    old = {name: re.sub(r"blk\.\d+\.", lambda m: blocks[m[0]], name) for name in ours}
    changed = {
        n for n in ours if ours[n].data.tobytes() != theirs[old[n]].data.tobytes()
    }
    wanted = named(dict.fromkeys(new_layers(gguf_run / "model.gguf.md")))
    assert {old[name] for name in changed} == wanted.keys()
    assert {ours[name].tensor_type for name in changed} == {Kind.Q8_0}
    for name in (n for n in changed if "ffn" in n):
        found = gguf.dequantize(ours[name].data, Kind.Q8_0)
        (place,) = (n for n in after if named({n: 0}).keys() == {name})
        wanted = after[place].float().numpy()
        assert np.linalg.norm(found - wanted) <= 0.01 * np.linalg.norm(wanted)


def test_reading_a_gguf_back_shows_progress(gguf_run, packed_model, tmp_path):
    bars = Bars()
    unpack_gguf(gguf_run / "model.gguf", tmp_path / "unpacked", bars)
    cut_gguf(packed_model, [2], tmp_path / "cut.gguf", progress=bars)
    assert list(bars.done) == ["unpacking model.gguf", "writing cut.gguf"]
    assert bars.done == bars.totals


def test_the_written_gguf_is_judged_with_its_checkpoint(gguf_run, typed):
    found = load_json(gguf_run / "evaluation.json")
    assert found.gguf.kl == pytest.approx(found.kl, rel=0.03)
    assert found.gguf.kl != found.kl
    assert found.gguf.bytes == (gguf_run / "model.gguf").stat().st_size
    figure = f"{found['gguf']['kl']:.4f}"
    for name in ("report.md", "report.html", "model.gguf.md"):
        assert figure in (gguf_run / name).read_text()
    assert figure in typed("evaluate", gguf_run / "model.gguf", "--skip-speed").out


def test_sizes_are_compared_with_the_file_that_the_user_has(gguf_run, packed_model):
    found = load_json(gguf_run / "evaluation.json")
    sizes = [path.stat().st_size for path in (packed_model, gguf_run / "model.gguf")]
    assert [found.before.bytes, found.gguf.bytes] == sizes
    before, after = (f"{size / 1e6:.1f}" for size in sizes)
    change = f"{100 * (sizes[1] / sizes[0] - 1):+.1f} %"
    names = ("report.md", "model/README.md", "model.gguf.md")
    page, card, packed_card = ((gguf_run / name).read_text() for name in names)
    row = rf"MB \| {before} \|.*\| {after} \|"
    assert re.search(rf"{row} {re.escape(change)}", page)
    assert f"takes {after} MB on disk instead of {before} ({change})" in page
    assert f"weights on disk | {before} MB (a GGUF file) |" in card
    assert re.search(row, packed_card)


def test_any_gguf_is_judged_against_its_original(
    gguf_run, packed_model, tmp_path, refusal
):
    file = gguf_run / "model.gguf"
    out = tmp_path / "scores.json"
    (tmp_path / "elsewhere.gguf").write_bytes(file.read_bytes())
    assert "give its original with --original" in refusal(
        "evaluate", tmp_path / "elsewhere.gguf"
    )
    line = [
        "evaluate",
        tmp_path / "elsewhere.gguf",
        "--original",
        packed_model,
        "--out",
        out,
    ]
    works(*line)
    found = load_json(out)
    assert found.kl > 0.001
    assert found.after.blocks == 4
    assert found.after.bytes == file.stat().st_size
    assert found.before.bytes == packed_model.stat().st_size


def test_any_checkpoint_is_judged_against_its_original(
    gguf_run, packed_model, tmp_path, refusal, typed
):
    shutil.copytree(gguf_run / "model", tmp_path / "cut")
    assert (
        "KL to the original"
        in typed(
            "evaluate", tmp_path / "cut", "--original", packed_model, "--skip-speed"
        ).out
    )
    found = load_json(tmp_path / "cut-evaluation.json")
    assert found.kl > 0.001
    assert (found.after.blocks, found.last) == (4, "patched")
    # An existing output is refused before the checkpoint is read.
    (tmp_path / "cut/config.json").unlink()
    assert "cut-evaluation.json already exists" in refusal(
        "evaluate", tmp_path / "cut", "--original", packed_model
    )


def test_a_gguf_that_llama_cpp_would_not_run_costs_no_checkpoint(
    gguf_run, monkeypatch, typed
):
    monkeypatch.setitem(gguf_cuts._TABLE, "cuttable", [])
    line = ["excise", gguf_run, "--blocks", "1,2", "--json"]
    said = typed(*line)
    assert "no GGUF file is written" in said.err
    found = json.loads(said.out)
    assert found["gguf"] is None
    assert (Path(found["checkpoint"]) / "model.safetensors").is_file()
