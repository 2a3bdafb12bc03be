"""What is streamed and what it may take; cuts proven, evaluated and run block by block."""

import json
import re
import shutil

import pytest
import torch

import isingcut
from isingcut.errors import InputError, VerificationError
from isingcut.evaluation import quality as evaluate
from isingcut.measure.losses import measure
from isingcut.models.cutting import verify
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.verify import verify_streamed
from isingcut.models.device import Allowance, allowance, container_room, weight_bytes
from isingcut.models.load import load
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import RunConfig
from isingcut.runs.session import Session
from shared import OPTIONS
from streams import CPU, samples, some_states, streamed, watch
from tiny import edit_tensors

pytestmark = pytest.mark.usefixtures("one_layout")


def test_memory_allowed_and_needed(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("isingcut.models.device._used_and_free", lambda device: (1000, 5000))
    assert allowance("", CPU) == Allowance(5000, 1000)
    assert allowance("50%", CPU).left == 2500
    assert allowance("3KB", CPU) == Allowance(3000, 1000)
    assert allowance("1GB", CPU).total == 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert allowance("", CPU).left == 1000
    with pytest.raises(InputError, match=r"memory 'much': expected a share .*, got 'much'"):
        allowance("much", CPU)
    parameters = sum(
        p.numel() for p in load(llama, dtype="float32", device="cpu").model.parameters()
    )
    assert weight_bytes(llama, torch.bfloat16) == 2 * parameters


def test_a_container_has_a_limit_of_its_own(tmp_path):
    assert container_room(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert container_room(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert container_room(tmp_path) > 1 << 60


def test_weights_that_do_not_fit_are_streamed(llama):
    config = RunConfig(model=str(llama), dtype="float32", device="cpu")
    assert not Session(config).streaming
    assert Session(config.replace(memory_limit="1KB")).streaming
    assert not Session(config.replace(memory_limit="1KB", stream="off")).streaming
    replay = Session(config.replace(memory_limit="1KB")).replay
    with pytest.raises(InputError, match=r"is 0\.00 GB, but streaming this model needs"):
        measure(replay, samples(), some_states(6))
    with pytest.raises(InputError, match="--stream must be one of"):
        config.replace(stream="maybe").validate()


def test_parts_that_stay_and_hidden_states_share_the_memory_that_is_left(llama):
    replay, tokens = streamed(llama), samples()
    states = some_states(6)
    expected = measure(replay, tokens, states).kl_sums
    batch, kept = tokens.batches(1024)[0], replay.store.buffers
    assert kept.allocated() == kept.bound == replay.store.weights
    taken = replay.memory.left - replay.room(batch) - kept.bound
    replay.memory = Allowance(taken + replay.store.weights, 0)
    assert replay.room(batch) == kept.bound == replay.store.weights // 2
    assert 0 < kept.allocated() <= kept.bound
    assert (measure(replay, tokens, states).kl_sums == expected).all()


@pytest.fixture(scope="module")
def cut(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "model"
    excise(llama, [1, 4], out)
    return out


def test_a_cut_is_proven_block_by_block(llama, cut, monkeypatch):
    replay = streamed(llama)
    seen = watch(replay)
    assert verify_streamed(replay, [1, 4], cut).difference == 0.0
    assert max(map(len, seen)) <= 2
    with pytest.raises(VerificationError, match="differs from the original"):
        verify_streamed(replay, [1, 3], cut)


def test_a_cut_with_wrong_layer_numbers_is_noticed(llama, cut, tmp_path, monkeypatch):
    replay = streamed(llama)
    build = verify.open_model

    def wrong(*args, **kwargs):
        model, store, memory = build(*args, **kwargs)
        model.model.layers[2].self_attn.layer_idx = 1
        return model, store, memory

    monkeypatch.setattr(verify, "open_model", wrong)
    with pytest.raises(VerificationError, match=r"does not generate|differs from generation"):
        verify_streamed(replay, [1, 4], cut, new_tokens=6)


def test_a_cut_that_does_not_load_is_noticed(llama, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "bad")
    with edit_tensors(tmp_path / "bad") as tensors:
        tensors["model.extra.weight"] = torch.zeros(1)
    with pytest.raises(VerificationError, match=r"unexpected keys: model\.extra\.weight"):
        verify_streamed(streamed(llama), [1, 4], tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match="does not load"):
        verify_streamed(streamed(llama), [1, 4], tmp_path / "bad")


def test_quality_of_a_streamed_pair_is_that_in_memory(llama, cut):
    pair = [load(folder, dtype="float32", device="cpu").model for folder in (llama, cut)]
    expected = evaluate.quality(*pair, samples(), batch_tokens=24)
    original = streamed(llama)
    smaller = StreamedReplay(
        *open_model(cut, dtype=torch.float32, device=CPU, buffers=original.store.buffers)
    )
    found = evaluate.before_and_after(original, smaller, samples(), batch_tokens=24)
    for key in ("kl", "kl_se"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-6)
    for side, model in zip(("before", "after"), pair, strict=True):
        figures = getattr(found, side)
        for key, value in getattr(expected, side).content().items():
            assert getattr(figures, key) == pytest.approx(value, rel=1e-6)
        assert figures.parameters == sum(p.numel() for p in model.parameters())
    assert (found.before.blocks, found.after.blocks) == (6, 4)


def test_a_whole_run_loads_no_model(llama, text, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    # All that takes the name is imported before: it would keep what stands there now.
    run = isingcut.run
    monkeypatch.setattr("isingcut.models.load.load", never)
    monkeypatch.setattr("isingcut.models.cutting.sharing.load", never)
    monkeypatch.setattr("isingcut.models.cutting.verify.reload", never)
    options = {
        **OPTIONS,
        "model": str(llama),
        "calibration": str(text),
        "stream": "on",
    }
    folder = run(remove=2, out=str(tmp_path / "run"), also="fisher", **options)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    chosen = json.loads((folder / "candidates.json").read_text())["chosen"]
    assert evaluation["streamed"]
    assert evaluation["after"]["blocks"] == 4
    assert len(chosen["removed"]) == 2
    report = (folder / "report.md").read_text()
    assert "not measured" in report
    assert re.search(r"\| weights \| streamed: read \d+\.\d times for the energy, \d+ %", report)
    for wrong, message in (
        ({"energy": "hessian"}, "'hessian' needs all blocks"),
        ({"calibration": "self"}, "would read a streamed model from disk for every token"),
    ):
        with pytest.raises(InputError, match=message):
            isingcut.energy(out=str(tmp_path / "no"), **{**options, **wrong})
    assert not (tmp_path / "no").exists()
