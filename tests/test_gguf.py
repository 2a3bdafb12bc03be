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

from gguf_files import NUMBERS, cut_gguf, named, write_gguf, write_packed
from isingcut.formats.cutting import gguf as gguf_cuts
from isingcut.formats.cutting.gguf import Changed, changed_tensors, lay_out
from isingcut.formats.gguf_files import read_gguf, unpack_gguf
from isingcut.formats.sources import resolve
from shared import (
    ArchitectureError,
    Bars,
    CheckpointError,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    run_tiny,
    works,
)
from tiny import edit_tensors, excise, gone, tiny_checkpoint


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
    heads = {"attention.head_count_kv": list(range(1, blocks + 1))}
    metadata = {"block_count": blocks, "context_length": 128, "flag": True}
    return write_gguf(
        path,
        {**metadata, **heads, **extra},
        held,
        endianess=endianess,
        architecture=architecture,
        more=lambda writer: writer.add_token_list([b"a", b"b", b"c", b"d"]),
    )


def field(file, name):
    """Return the value of a key of a GGUF file, None without it."""
    found = file.get_field(name)
    return found and found.contents()


def tensors_of(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def test_blocks_are_renumbered_and_bytes_kept(tmp_path):
    source = make(tmp_path / "in.gguf", leading_dense_block_count=2)
    cut_gguf(source, [0, 2], tmp_path / "out.gguf")
    old = tensors_of(source)
    new = tensors_of(tmp_path / "out.gguf")
    names = {
        f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("ffn_up", "attn_norm")
    }
    assert new.keys() == {"token_embd.weight", *names}
    for name, tensor in new.items():
        theirs = old[name.replace("blk.1.", "blk.3.").replace("blk.0.", "blk.1.")]
        assert tensor.tensor_type == theirs.tensor_type
        assert list(tensor.shape) == list(theirs.shape)
        assert tensor.data.tobytes() == theirs.data.tobytes()
    before, after = map(gguf.GGUFReader, (source, tmp_path / "out.gguf"))
    assert field(after, "llama.block_count") == 2
    assert field(after, "llama.attention.head_count_kv") == [2, 4]
    assert field(after, "llama.leading_dense_block_count") == 1
    for key in ("llama.context_length", "tokenizer.ggml.tokens", "llama.flag"):
        assert field(after, key) == field(before, key)


def test_a_file_of_another_byte_order_gets_no_new_values(tmp_path):
    source = make(tmp_path / "in.gguf", endianess=gguf.GGUFEndian.BIG)
    cut_gguf(source, [0, 2], tmp_path / "out.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").endianess == gguf.GGUFEndian.BIG
    with refuses("is big-endian and this machine is not", ArchitectureError):
        cut_gguf(source, [0, 2], tmp_path / "new.gguf", packed="Q8_0")


def test_mtp_layers_behind_the_blocks_stay(tmp_path):
    source = make(tmp_path / "in.gguf", "deepseek2", blocks=5, nextn_predict_layers=2)
    cut_gguf(source, [1], tmp_path / "out.gguf")
    cut_gguf(source, [1], tmp_path / "none.gguf", drop_mtp=True)
    after, none = (
        gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("out", "none")
    )
    assert field(after, "deepseek2.attention.head_count_kv") == [1, 3, 4, 5]
    for key, kept, dropped in (("block_count", 4, 2), ("nextn_predict_layers", 2, 0)):
        assert field(after, f"deepseek2.{key}") == kept
        assert field(none, f"deepseek2.{key}") == dropped
    before, found = (tensors_of(p) for p in (source, tmp_path / "out.gguf"))
    for new, old in enumerate((0, 2, 3, 4)):
        theirs = before[f"blk.{old}.ffn_up.weight"].data.tobytes()
        assert found[f"blk.{new}.ffn_up.weight"].data.tobytes() == theirs
    assert not any("blk.2." in t.name for t in none.tensors)
    with refuses("must be 0 to 2", ArchitectureError):
        cut_gguf(source, [3], tmp_path / "no.gguf")


@parametrize(
    "architecture, blocks, extra, words, kind",
    [
        ("llama", 4, {"mystery": [1, 2, 3, 4]}, r"llama\.mystery' looks per-layer", None),
        ("cohere2", 4, {}, "may derive the kind of a 'cohere2'", None),
        ("llama", 1, {}, "must be 0 to 0", None),
        ("deepseek2", 27, {}, r"computes a '\w+' of 26 blocks differently", None),
        ("gemma3", 63, {}, r"computes a '\w+' of 62 blocks differently", None),
        ("gemma2", 12, {"attention.sliding_window_pattern": [True] * 11},
         "a period or one entry for each of 12 blocks", CheckpointError),
    ],
)  # fmt: skip
def test_what_is_unknown_or_numbered_is_refused(
    tmp_path, architecture, blocks, extra, words, kind
):
    source = make(tmp_path / "in.gguf", architecture, blocks, **extra)
    with refuses(words, kind or ArchitectureError):
        cut_gguf(source, [1], tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


SMALL = {"attention.sliding_window": 8}
PATTERN = "attention.sliding_window_pattern"


@parametrize(
    "architecture, extra, expected",
    [
        # Of 12 blocks, 5 and 11 have no window; without 1 and 7 they are blocks 4 and 9.
        ("gemma3", SMALL, "wwww.wwww."),
        ("gemma3", {}, None),
        ("gemma3", {**SMALL, PATTERN: 4}, "ww.wwwwww."),
        # Blocks 0, 2, ... have windows.
        ("gemma2", {}, "ww.w.ww.w."),
        ("gemma2", {PATTERN: [True] * 2 + [False] * 10}, "w........."),
    ],
)
def test_blocks_keep_their_windows(tmp_path, architecture, extra, expected):
    source = make(tmp_path / "in.gguf", architecture, 12, **extra)
    cut_gguf(source, [1, 7], tmp_path / "out.gguf")
    found = field(gguf.GGUFReader(tmp_path / "out.gguf"), f"{architecture}.{PATTERN}")
    assert found == (expected and [letter == "w" for letter in expected])


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


def patched(source, file, out):
    """Write the model without blocks 2 and 3 and with changed weights in the layer before them;
    return the weights, and what has changed from the file."""
    excise(source, [2, 3], out)
    generator = torch.Generator().manual_seed(1)
    with edit_tensors(out) as tensors:
        noise = (
            torch.randn(tensors[DOWN].shape, generator=generator) * tensors[DOWN].std()
        )
        tensors[DOWN] = tensors[DOWN] + 0.3 * noise
    return tensors[DOWN], changed_tensors(read_gguf(file), source, out, gone([2, 3]))


@parametrize(
    "kind, then, most",
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
    wanted, changed = patched(source, file, tmp_path / "patched")
    assert list(changed) == [THEIRS]
    cut_gguf(file, [2, 3], tmp_path / "plain.gguf")
    cut_gguf(file, [2, 3], tmp_path / "out.gguf", changed=changed)
    plain, out = (tensors_of(tmp_path / f"{name}.gguf") for name in ("plain", "out"))
    assert plain.keys() == out.keys()
    differ = [n for n in plain if plain[n].data.tobytes() != out[n].data.tobytes()]
    assert differ == [THEIRS]
    assert out[THEIRS].tensor_type == then
    found = gguf.dequantize(out[THEIRS].data, out[THEIRS].tensor_type)
    assert np.linalg.norm(found - wanted.numpy()) <= most * np.linalg.norm(wanted)
    assert list(out[THEIRS].shape) == list(plain[THEIRS].shape)


def test_a_tensor_in_another_order_is_refused(tmp_path):
    source, file = model_and_file(tmp_path, Kind.Q8_0, turned=True)
    _, changed = patched(source, file, tmp_path / "patched")
    with refuses(rf"stores {DOWN} differently from the .*--patch", ArchitectureError):
        cut_gguf(file, [2, 3], tmp_path / "out.gguf", changed=changed)
    assert not (tmp_path / "out.gguf").exists()


def test_norms_that_are_stored_plus_one_are_shifted():
    old, new = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    tensor = SimpleNamespace(data=old + 1, tensor_type=Kind.F32)
    found = lay_out(Path("m.gguf"), tensor, Changed("n", lambda: old, lambda: new))
    assert np.array_equal(found, new + 1)


@module_fixture
def packed_model(tmp_path_factory):
    """A GGUF file of a tiny llama, the layers of its blocks in Q4_1."""
    return write_packed(tmp_path_factory.mktemp("packed") / "tiny-Q4_1.gguf", Kind.Q4_1)


@module_fixture
def gguf_run(packed_model, text, tmp_path_factory):
    """A run on that file, without blocks 2 and 3, with a tuned patch."""
    out = tmp_path_factory.mktemp("gguf") / "run"
    return run_tiny(
        packed_model,
        text,
        out,
        energy="fisher",
        remove=2,
        must_remove="2,3",
    )


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

    def old_name(name):
        """Return the name of a tensor in the original, of either format."""
        return re.sub(r"(?<=[sk]\.)\d+(?=\.)", lambda m: str(kept[int(m[0])]), name)

    before = load_file(resolve(str(packed_model)) / "model.safetensors")
    after = load_file(gguf_run / "model/model.safetensors")
    differ = {
        old_name(n) for n in after if not torch.equal(before[old_name(n)], after[n])
    }
    card = gguf_run / "model/README.md"
    assert "all other tensors are the original's" in card.read_text()
    assert new_layers(card) == differ

    theirs, ours = map(tensors_of, (packed_model, gguf_run / "model.gguf"))
    old = {name: old_name(name) for name in ours}
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
    assert figure in typed("evaluate", gguf_run).out


def test_sizes_are_compared_with_the_file_that_the_user_has(gguf_run, packed_model):
    found = load_json(gguf_run / "evaluation.json")
    sizes = [path.stat().st_size for path in (packed_model, gguf_run / "model.gguf")]
    assert [found.before.bytes, found.gguf.bytes] == sizes
    before, after = (f"{size / 1e6:.1f}" for size in sizes)
    change = f"{100 * (sizes[1] / sizes[0] - 1):+.1f} %"
    names = ("report.md", "model/README.md", "model.gguf.md")
    page, card, packed_card = ((gguf_run / name).read_text() for name in names)
    row = rf"MB.* \| {before} \|.*\| {after} \|"
    assert re.search(rf"{row} {re.escape(change)}", page)
    assert f"- size: {after} MB on disk instead of {before} ({change})" in page
    assert f"weights on disk | {before} MB (a GGUF file) |" in card
    assert re.search(row, packed_card)


def test_any_gguf_is_judged_against_its_original(
    gguf_run, packed_model, tmp_path, refusal
):
    file = tmp_path / "elsewhere.gguf"
    out = tmp_path / "scores.json"
    shutil.copy(gguf_run / "model.gguf", file)
    assert "give its original with --original" in refusal("evaluate", file)
    works("evaluate", file, "--original", packed_model, "--out", out)
    found = load_json(out)
    assert found.kl > 0.001
    assert found.after.blocks == 4
    sizes = [path.stat().st_size for path in (packed_model, file)]
    assert [found.before.bytes, found.after.bytes] == sizes


def test_any_checkpoint_is_judged_against_its_original(
    gguf_run, packed_model, tmp_path, refusal, typed
):
    cut = shutil.copytree(gguf_run / "model", tmp_path / "cut")
    line = ("evaluate", cut, "--original", packed_model)
    assert "KL to the original" in typed(*line).out
    found = load_json(tmp_path / "cut-evaluation.json")
    assert found.kl > 0.001
    assert (found.after.blocks, found.last) == (4, "patched")
    # An existing output is refused before the checkpoint is read.
    (cut / "config.json").unlink()
    assert "cut-evaluation.json already exists" in refusal(*line)


def test_a_gguf_that_llama_cpp_would_not_run_costs_no_checkpoint(
    gguf_run, monkeypatch, typed
):
    monkeypatch.setitem(gguf_cuts._TABLE, "cuttable", [])
    said = typed("excise", gguf_run, "--blocks", "1,2", "--json")
    assert "no GGUF file is written" in said.err
    found = json.loads(said.out)
    assert found["gguf"] is None
    assert (Path(found["checkpoint"]) / "model.safetensors").is_file()
