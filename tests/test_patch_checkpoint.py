"""Patches of whole cut checkpoints: which cuts get one, streamed originals, what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isingcut.errors import InputError
from isingcut.healing.job import Job
from isingcut.healing.patch import linear
from isingcut.healing.patch.least_squares import Moments, RidgeFit, bytes_of, fit_ridge
from isingcut.healing.patch.linear import fit_patches, patch_checkpoint
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, skipped, stack_modules
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import LoadedModel, load
from isingcut.models.memory import Allowance
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import load_streamed
from isingcut.models.streaming.store import StoredPart
from isingcut.options.config import HealConfig
from isingcut.testing.tiny import tiny_checkpoint, tiny_model
from patching import streams, tokens, watched


def job_of(folder: Path, family: str, removed: tuple[int, ...], **options: Any) -> Job:
    source = tiny_checkpoint(family, folder / "source", **options)
    excise(source, removed, folder / "cut")
    return Job(
        load(source, dtype="float32", device="cpu"),
        removed,
        folder / "cut",
        tokens(32),
        folder / "work",
        HealConfig(patch="linear", patch_tokens=4096),
    )


def test_the_cuts_that_can_be_patched_are_and_the_others_listed(tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", (0, 1, 4))
    record = patch_checkpoint(job, tmp_path / "patched")
    assert [c["removed"] for c in record["cuts"]] == [[4, 4]]
    (left,) = record["unpatched"]
    assert left["removed"] == [0, 1]
    assert left["reason"].startswith("block 0 is removed, so that nothing stands before")


def test_a_cut_that_no_map_helps_is_listed_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = tiny_model("llama"), []

    def first_fails(fit: Moments, held_out: Moments) -> RidgeFit | None:
        calls.append(fit)
        if len(calls) == 1:
            return None
        return fit_ridge(fit, held_out)

    monkeypatch.setattr(linear, "fit_ridge", first_fails)
    stack = find_stack(model)
    replay = Replay(model, stack_modules(model, stack))
    found = fit_patches(replay, stack.kinds, tokens(), [2, 4], Work(96))
    assert [(c["removed"], c["reason"][:39]) for c in found.unpatched] == [
        ([2, 2], "no map of block 1's mlp.down_proj is be")
    ]
    (alone,) = found.patches
    # As if the first cut could not be patched: fitted on the cut model as it is.
    target = streams(model, tokens(), 4)
    with skipped(model, stack, [2]), watched(model, 3, alone.path) as seen, torch.no_grad():
        model(tokens().input_ids, use_cache=False)
    mask = tokens().mask
    x, out = seen["read"][mask], seen["stream"][mask]
    weights = 1 / target.square().mean(-1)
    change = alone.weight - model.model.layers[3].mlp.down_proj.weight.double()
    ridge = alone.record["ridge"] * torch.diagonal((x * weights[:, None]).T @ x).mean()
    left = (target - out - x @ change.T) * weights[:, None]
    torch.testing.assert_close(left.T @ x, ridge * change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "again"), [("llama", 0), ("gemma2", 1)])
def test_an_original_that_is_streamed_is_read_once_and_gives_the_same_patch(
    family: str, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = (0, 2, 3)
    job = job_of(tmp_path, family, removed)
    expected = patch_checkpoint(job, tmp_path / "in-memory")
    teacher, replay = load_streamed(tmp_path / "source", dtype="float32", device="cpu")
    replay.store.buffers.keep_at_most(0)
    read: list[Any] = []
    fill = StoredPart.fill
    monkeypatch.setattr(StoredPart, "fill", lambda p, b: (read.append(p.part), fill(p, b)))
    stack = find_stack(teacher.model)
    text = tokens(32)
    fit_patches(replay, stack.kinds, text, removed, Work(96))
    # Block 0 may have been read ahead; blocks behind the last cut are not needed. What answers by
    # gains is read again, once its target is known.
    assert [read.count(i) for i in range(1, 6)] == [1 + again, 1, 1, 0, 0]
    job = dataclasses.replace(job, teacher=teacher, replay=replay)
    record = patch_checkpoint(job, tmp_path / "streamed")
    assert record == expected
    a, b = (tmp_path / n / "model.safetensors" for n in ("in-memory", "streamed"))
    assert a.read_bytes() == b.read_bytes()


def test_what_a_layer_writes_is_mapped_where_memory_has_no_room_for_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, "llama", (2, 3))
    name = "model.layers.1.mlp.down_proj.weight"
    width = job.teacher.model.config.hidden_size
    before = job.teacher.model.get_parameter(name).detach().double()

    def outside_row_space(folder: Path) -> float:
        weight = load_file(folder / "model.safetensors")[name].double()
        return float((weight - weight @ torch.linalg.pinv(before) @ before).abs().max())

    assert patch_checkpoint(job, tmp_path / "reads")["maps"] == "reads"
    assert outside_row_space(tmp_path / "reads") > 1e-3
    monkeypatch.setattr(linear, "allowance", lambda *given: Allowance(bytes_of(width), 0))
    record = patch_checkpoint(job, tmp_path / "writes")
    assert record["maps"] == "writes"
    assert record["cuts"][0]["held_out_error_left"] < 1
    # W' = (1 + T) W.
    assert outside_row_space(tmp_path / "writes") < 1e-5


def test_more_tokens_than_memory_beside_a_streamed_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    teacher, replay = load_streamed(source, dtype="float32", device="cpu")
    monkeypatch.setattr(type(replay), "room", lambda self, batch: 10_000)
    kinds = find_stack(teacher.model).kinds
    with pytest.raises(InputError, match=r"on 252 tokens needs .* left; give fewer --patch-tokens"):
        fit_patches(replay, kinds, tokens(), [3], Work(96))


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gpt_neox", "nemotron_h", "gemma3", "olmo2", "qwen3_moe", "gpt_oss", "rwkv"],
)
def test_the_written_checkpoint_is_plain_and_computes_the_patch(
    family: str, tmp_path: Path
) -> None:
    from isingcut.models.checkpoint.read import read_checkpoint

    removed = (3,) if family == "nemotron_h" else (2, 3)
    job = job_of(tmp_path, family, removed)
    record = patch_checkpoint(job, tmp_path / "patched")
    assert [c["removed"] for c in record["cuts"]] == [[removed[0], removed[-1]]]
    assert record["cuts"][0]["held_out_error_left"] < 1
    before, after = (read_checkpoint(tmp_path / n) for n in ("cut", "patched"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }

    def data(t: Any) -> bytes:
        content: bytes = t.file.read_bytes()[t.start : t.start + t.size]
        return content

    changed = {n for n in before if data(before[n]) != data(after[n])}
    layer = record["cuts"][0]["layer"]
    assert {n.rsplit(".", 1)[1] for n in changed} <= {"weight", "bias"}
    assert all(n.rsplit(".", 1)[0].endswith(layer) for n in changed)
    assert changed
    loaded: LoadedModel = load(tmp_path / "patched", dtype="float32", device="cpu")
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(
        p.numel() for p in load(tmp_path / "cut", dtype="float32").model.parameters()
    )
