"""A budget for a packed model: size and loss of each type, and the chosen type or cut."""

import re

import gguf
import numpy as np
import pytest
import torch

from gguf_files import WIDE, WIDE_NUMBERS, cut_gguf, held_by, named, write
from isingcut.console.progress import silent
from isingcut.files.runs import PackingFile
from isingcut.formats.cutting import gguf as gguf_cuts
from isingcut.formats.gguf_files import PACKED
from isingcut.measure.packed import changed_losses
from isingcut.measure.streams import Kept
from isingcut.measure.work import PLAIN
from isingcut.models.packing import Packer
from isingcut.processes import ALONE
from isingcut.runs import packing, pipeline
from shared import (
    OPTIONS,
    ArchitectureError,
    RunConfig,
    flags,
    load_json,
    module_fixture,
    parametrize,
    read_document,
    refuses,
    works,
)
from tiny import (
    Context,
    in_memory,
    plain_sums,
    random_tokens,
    streamed,
    tiny_checkpoint,
    tiny_model,
    without,
)

pytestmark = pytest.mark.usefixtures("no_speed")
IDLE = 3
"""Index of the block that adds nothing to the stream, the only one that is free to remove."""


@module_fixture
def file(tmp_path_factory):
    """A GGUF file of a tiny llama in float16, its down-projections in Q5_1."""
    model = tiny_model("llama", **WIDE)
    kind = gguf.GGMLQuantizationType.Q5_1
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            for last in (block.self_attn.o_proj, block.mlp.down_proj):
                last.weight *= 0 if i == IDLE else 4
    held = held_by(model)
    for name, values in held.items():
        if "ffn_down" in name:
            held[name] = (gguf.quantize(values, kind), kind)
        elif values.ndim == 2:
            held[name] = values.astype(np.float16)
    out = tmp_path_factory.mktemp("packing") / "tiny.gguf"
    write(out, held, **WIDE_NUMBERS)
    return out


def whole(file, kind, folder):
    """Return the size of the file with every block, packed in a type."""
    cut_gguf(file, [], folder / "whole.gguf", packed=kind)
    return (folder / "whole.gguf").stat().st_size


def test_bytes_are_those_of_the_file_written_and_weights_what_it_holds(file, tmp_path):
    config = RunConfig(model=file, dtype="float32", device="cpu")
    context = Context(config)
    packer = Packer(context.loaded, file)
    costs = context.describe_blocks(config.budget).blocks
    for kind in ("", *PACKED):
        predicted = packer.costs(kind, costs)
        assert predicted.size([]) == whole(file, kind, tmp_path)
        cut_gguf(file, [1, 2], tmp_path / f"{kind}.gguf", packed=kind)
        # The header of the whole file is longer by two blocks of nine tensors.
        header = predicted.size([1, 2]) - (tmp_path / f"{kind}.gguf").stat().st_size
        assert 0 < header < 2 * 9 * 80
    parameters = dict(context.loaded.model.named_parameters())
    there = {t.name: t for t in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    for name, theirs in zip(parameters, named(parameters), strict=True):
        found = packer.pack("Q4_0", name, parameters[name].detach())
        if theirs == "token_embd.weight" or "ffn_down" in theirs:
            tensor = there[theirs]
            assert tensor.tensor_type.name == ("Q4_0" if "ffn" in theirs else "Q8_0")
            held = gguf.dequantize(tensor.data, tensor.tensor_type)
            # The weights in memory were rounded to bfloat16 before.
            assert np.linalg.norm(found.numpy() - held) <= 0.05 * np.linalg.norm(held)
        assert (found is None) == ("norm" in name)


@parametrize("read", [in_memory, streamed])
def test_changed_weights_are_measured_and_restored(read, tmp_path):
    folder = tiny_checkpoint("gemma3", tmp_path / "model")
    replay = read(folder)
    tokens = random_tokens((12, 9, 12))
    original = in_memory(folder).model
    other = in_memory(folder).model
    before = {name: p.clone() for name, p in original.named_parameters()}

    def change(name, own):
        return None if "norm" in name else own * 1.02 + 0.01 * own.roll(1, 0)

    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(p if (new := change(name, p)) is None else new)
    found = changed_losses(replay, tokens, change, PLAIN, "changed", [1, 4])
    wanted = plain_sums(original, without(other, [1, 4]), tokens)[2]
    assert np.allclose(found, wanted, rtol=1e-3)
    assert changed_losses(replay, tokens, lambda *_: None, PLAIN, "same").max() < 1e-6
    kept = Kept()
    known = {2: "without 1", 5: "without 1 and 4"}
    for removed in ([1, 4], [1, 4], [1]):
        given = (replay, tokens, change, PLAIN, "changed", removed)
        again = changed_losses(
            *given, kept, {i: known[i] for i in known if i - 1 in removed}
        )
        assert np.array_equal(again, changed_losses(*given))
    if read is in_memory:
        assert all(
            torch.equal(before[n], p) for n, p in replay.model.named_parameters()
        )


def test_memory_counts_the_cache_and_decoding_the_bytes_read(
    file, tmp_path, monkeypatch
):
    def fitting(budget, window=0):
        config = RunConfig(model=file, dtype="float32", budget=budget)
        context = Context(config)
        blocks = context.describe_blocks(config.budget)
        for block in blocks.blocks:
            block.window = window
        _, found = packing.find_types(context, config, blocks)
        return [f.packed.type for f in found if f.fits]

    # Two heads of keys and of values, of 16 numbers in float16, in 6 blocks.
    size = whole(file, "Q5_0", tmp_path) / 1e3
    cache = 8192 * 2 * 2 * 16 * 2 * 6 / 1e3
    assert fitting(f"memory={size + cache:.3f}kB@8k") == ["Q5_0", "Q4_1", "Q4_0"]
    assert fitting(f"memory={size + cache - 0.1:.3f}kB@8192") == ["Q4_1", "Q4_0"]
    half = f"memory={size + cache / 2:.3f}kB@8k"
    assert fitting(half, window=4096) == ["Q5_0", "Q4_1", "Q4_0"]
    # Q8_0 has 8.5 bits instead of 16, and the cache is the same.
    assert fitting("decode=40%") == ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
    assert fitting("decode=40%,file=999MB") == fitting("decode=40%")
    assert fitting("decode=1%@100k") == []
    # If llama.cpp would not run a cut of this model, only whole types are left.
    monkeypatch.setitem(gguf_cuts._TABLE, "cuttable", [])
    with refuses("may derive the kind of a 'llama' block", ArchitectureError):
        fitting("file=100kB")


def chosen(file, text, out, budget):
    given = {"model": file, "calibration": text, "out": out, "budget": budget}
    config = pipeline.check_options(None, {**OPTIONS, **given}, "isingcut.run")
    with pipeline.open_run(config, silent, ALONE, need_removal=True) as runner:
        return packing.choose_type(runner, config)


def test_every_budget_ends_in_the_type_and_blocks_that_are_best(file, text, tmp_path):
    size = {kind: whole(file, kind, tmp_path) for kind in ("", *PACKED)}
    # Without the idle block nothing is lost, while every smaller type loses something.
    found = chosen(file, text, tmp_path / "idle", f"file={size[''] / 1e3 - 0.1:.3f}kB")
    assert (found.best.packed.type, found.best.removed) == ("", [IDLE])
    assert found.best.measured < 1e-6
    # In the type of the file, several of the other blocks would have to be removed.
    found = chosen(file, text, tmp_path / "whole", f"file={size['Q8_0'] / 1e3:.3f}kB")
    assert (found.best.packed.type, found.best.fits) == ("Q8_0", True)
    assert 0 < found.best.kl < min(f.loss for f in found.types if f is not found.best)


def test_a_budget_below_every_type_is_met_by_a_cut_file(
    file, text, tmp_path, answer, refusal
):
    run = tmp_path / "run"
    size = whole(file, "Q4_0", tmp_path) / 1e3 - 1
    given = {"budget": f"file={size:.3f}kB", "calibration": text, "out": run}
    few = {"random_states": 0, "effort": 2, "patch_tokens": 400}
    line = ["run", file, *flags({**OPTIONS, **few, **given})]
    said = answer(*line)
    best = read_document(run / "packing.json", PackingFile).best
    assert not best.fits
    assert said.chosen.removed
    assert (run / "model.gguf").stat().st_size <= 1e3 * size
    assert f"with the rest in {best.packed.type} is best" in said.verdict
    assert "meets it in no type" in said.verdict
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(run / "model.gguf").tensors}
    assert kinds == {"F32", "Q8_0", best.packed.type}
    card = (run / "model.gguf.md").read_text()
    assert (
        f"ll matrices are packed as {best.packed.type}, those outside the blocks"
        in card
    )
    assert "bit for bit" not in card
    assert said.verdict[:40].replace("-", "−") in (run / "report.html").read_text()
    # Nothing is measured again, and another limit is for the same type.
    works(*line, "--quiet")
    works("solve", run, "--budget", f"file={size - 1:.3f}kB")
    assert "meets --budget file=1GB; no block has to be removed" in refusal(
        "solve", run, "--budget", "file=1GB"
    )


def test_what_no_type_meets_is_refused_with_what_can_be_met(
    llama, text, tmp_path, refusal
):
    given = {"out": tmp_path / "run", "calibration": text, "length": 16}
    for budget in ("file=1kB", "memory=2kB@1k", "decode=99%@1k"):
        said = refusal("run", llama, *flags({**given, "budget": budget}))
        nearest = re.search(r"the nearest possible is (\S+)$", said)[1]
        config = RunConfig(model=llama, dtype="float32", budget=nearest)
        context = Context(config)
        blocks = context.describe_blocks(config.budget)
        assert packing.find_types(context, config, blocks)
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_best_whole_is_not_cut(llama, text, tmp_path, typed):
    run = tmp_path / "run"
    given = {"budget": "decode=40%", "calibration": text, "out": run}
    said = typed("run", llama, *flags({**OPTIONS, **given})).out
    said = " ".join(said.split())
    kind = read_document(run / "packing.json", PackingFile).best.packed.type
    assert f"Do not cut: quantise to {kind} for decode=40%, KL 0.0" in said
    command = f"convert_hf_to_gguf.py {llama} --outtype bf16 --outfile model-bf16.gguf"
    for text in (said, (run / "report.md").read_text()):
        assert command in text
        assert f"--token-embedding-type q8_0 model-bf16.gguf model.gguf {kind}" in text
    assert not (run / "model").exists()
    assert load_json(run / "run.json").complete
