"""A healing that stops half-way is never lost, and what it says is so."""

import errno
import json
import os

import pytest
import torch
from arena import Row
from heal_rows import first_weight, heal, record, tensors
from model_files import both

from isingcut.files.writing import mark
from isingcut.models.cutting.checkpoint import excise


class Stopped(Exception):
    """What a kill does, as far as the files are concerned."""


def types(arena, command, name="healing", **more):
    """Try a command that may make the output and its work folder; what it left there."""
    more = {"line": "", "code": 0, "makes": ("healed*", ".healed.healing*"), **more}
    arena.try_row(Row(name, command, **more))
    work = arena.here / ".healed.healing"
    return sorted(p.name for p in work.iterdir()) if work.exists() else []


def stops(monkeypatch, step, error, part="_save_scaler"):
    """Raise while the Trainer writes the state of a step, the weights already there."""
    from transformers import Trainer

    save = getattr(Trainer, part)

    def torn(trainer, *arguments, **rest):
        save(trainer, *arguments, **rest)
        if trainer.state.global_step == step:
            raise error

    monkeypatch.setattr(Trainer, part, torn)


SAVING = heal(save_steps=1)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def curve(arena, out="healed"):
    found = json.loads((arena.here / out / "healing.json").read_text(encoding="utf-8"))
    return found["steps"]


def half_written(arena, step):
    """The state of a step as a kill leaves it: some files, none of them marked."""
    place = arena.here / ".healed.healing" / "trainer" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"half")
    (place / "trainer_state.json").write_text('{"global_step"', encoding="utf-8")


def test_a_full_disk_at_the_second_state_keeps_the_first(arena, monkeypatch):
    whole = heal(out="{here}/whole", save_steps=1)
    types(arena, whole, makes=("whole*", ".whole*"))
    with monkeypatch.context() as patch:
        stops(patch, 2, FULL)
        line = "no space left .*checkpoint-2 was not written; .*finished work is kept in "
        left = types(arena, SAVING, code=2, line=line)
    assert left == ["before.json", "identity.json", "memory.json", "trainer"]
    states = sorted(p.name for p in (arena.here / ".healed.healing/trainer").iterdir())
    assert states == ["checkpoint-1"]
    half_written(arena, 3)
    assert types(arena, SAVING) == []
    assert curve(arena) == curve(arena, "whole")


def test_used_up_memory_keeps_the_states(arena, monkeypatch):
    stops(monkeypatch, 2, MemoryError())
    line = r"this machine is out of memory; .*finished work is kept in .*healing"
    assert "trainer" in types(arena, SAVING, code=2, line=line)


def test_a_full_disk_at_the_first_state_leaves_nothing(arena, monkeypatch):
    stops(monkeypatch, 1, FULL)
    assert types(arena, SAVING, code=2, line="no space left .*checkpoint-1", makes=()) == []


def test_half_a_state_alone_is_begun_anew(arena, monkeypatch):
    with monkeypatch.context() as patch:
        stops(patch, 1, Stopped())
        # A kill leaves no chance to clean up.
        patch.setattr("isingcut.healing.work_folder.release", lambda work: None)
        patch.setattr("isingcut.healing.training.train.shutil.rmtree", lambda *a, **k: None)
        left = types(arena, SAVING, code=1, line="internal error")
    assert "trainer" in left
    assert [p.name for p in (arena.here / ".healed.healing/trainer").iterdir()] == ["checkpoint-1"]
    # Nothing in it is worth going on from, so that other options may take its place.
    assert types(arena, heal(save_steps=1, learning_rate=1e-3)) == []
    assert len(curve(arena)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "healing-curve.json"])
def test_a_damaged_state_is_left_out(arena, monkeypatch, name):
    with monkeypatch.context() as patch:
        stops(patch, 2, Stopped(), part="save_model")
        types(arena, SAVING, code=1, line="internal error")
    state = arena.here / ".healed.healing/trainer/checkpoint-1"
    os.truncate(state / name, 9)
    assert types(arena, SAVING) == []
    assert [s["step"] for s in curve(arena)] == [1, 2]


# Weights shrink by the rate times this, so that a rate of 10 blows them up.
BLOWN = {"weight_decay": 1e35, "max_steps": 4, "warmup_steps": 0}


@pytest.mark.parametrize("saved", [1, 50])
def test_the_advice_after_no_number_works(arena, saved):
    settings = {**BLOWN, "save_steps": saved}
    line = "the loss of step . is nan; set a lower learning_rate in the --trainer file, here 10"
    first = heal("--patch none", **settings, learning_rate=10.0)
    assert types(arena, first, code=2, line=line, makes=()) == []
    assert types(arena, heal("--patch none", **settings, learning_rate=1e-37)) == []


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("isingcut.healing.training.train._publish", FULL),
        ("isingcut.healing.heal.healed_card", FULL),
        (
            "isingcut.healing.training.train.OurTrainer.save_model",
            RuntimeError("unexpected pos 5 vs 3"),
        ),
    ],
)
def test_a_full_disk_after_the_training(arena, monkeypatch, place, error):
    def full(*arguments, **rest):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        left = types(arena, heal(), code=2, line="no space left on the disk.*healing")
    assert (left != []) == ("save_model" not in place)
    assert types(arena, heal()) == []


def test_another_teacher_may_stand_for_the_original(arena):
    first = tensors("model", lambda t: first_weight(t, 1.0))
    types(arena, heal("--other-teacher"), prepare=first)
    assert len(curve(arena)) == 2


def test_an_old_record_without_a_hash_goes_on_working(arena):
    old = record(lambda r: {"removed": r["removed"], "of": r["of"]})
    types(arena, heal(), prepare=both(old, lambda arena: mark(arena.run / "model")))


def test_a_healed_student_is_healed_again(arena):
    """Its weights are no longer the teacher's, and its record still holds."""
    types(arena, heal(learning_rate=1e-2))
    again = heal(student="{here}/healed", out="{here}/again")
    types(arena, again, makes=("again*", ".again*"))
    lying = json.dumps({"removed": [0, 5], "of": 6})
    (arena.here / "healed" / "isingcut.json").write_text(lying, encoding="utf-8")
    more = heal(student="{here}/healed", out="{here}/more")
    line = "is block .* of the teacher .*, but by its record"
    types(arena, more, code=2, line=line, makes=())


def test_overwrite_replaces_what_healing_wrote(arena):
    types(arena, heal())
    types(arena, heal("--overwrite --seed 1"))
    found = json.loads((arena.here / "healed" / "healing.json").read_text(encoding="utf-8"))
    assert found["options"]["seed"] == 1


def test_a_patch_that_would_change_nothing_says_so(arena, monkeypatch):
    arena.try_row(Row("cut", "excise {run} --patch none --overwrite", code=0, makes=("run/*",)))
    from isingcut.healing.patch import linear

    def none_is_better(fit, held_out):
        return None

    monkeypatch.setattr(linear, "fit_ridge", none_is_better)
    line = r"no map of block \d's mlp.down_proj is better than none on validation tokens"
    assert types(arena, heal("--patch linear --method none"), code=2, line=line, makes=()) == []


def exact_cut(arena):
    """A student whose weights are the original's, unlike the patched one of the run."""
    removed = json.loads((arena.run / "model" / "isingcut.json").read_text(encoding="utf-8"))
    record = json.dumps({key: removed[key] for key in ("removed", "of")})
    files = {"isingcut.json": record}
    excise(arena.model, removed["removed"], arena.here / "exact", extra_files=files)


def test_a_patch_that_vanished_in_rounding_says_so(arena, monkeypatch):
    from isingcut.healing.patch import linear
    from isingcut.healing.patch.linear import RidgeFit

    def too_small(fit, held_out):
        return RidgeFit(torch.zeros_like(fit.tx), 1.0, 0.99)

    monkeypatch.setattr(linear, "fit_ridge", too_small)
    line = r"warning: the linear patch changed nothing \(block \d's mlp.down_proj"
    command = heal("--patch linear --method none", student="{here}/exact")
    types(arena, command, line=line, prepare=exact_cut)
    found = json.loads((arena.here / "healed" / "healing.json").read_text(encoding="utf-8"))
    assert found["patch"]["changed"] is False
    assert {c["changed"] for c in found["patch"]["cuts"]} == {False}


def test_a_sample_longer_than_the_model_says_so(arena):
    line = "warning: samples have 128 tokens instead of --length 1000000"
    types(arena, heal("--length 1000000"), line=line)
    found = json.loads((arena.here / "healed" / "healing.json").read_text(encoding="utf-8"))
    assert (found["length"], found["report_tokens"]) == (128, 2 * 127)
