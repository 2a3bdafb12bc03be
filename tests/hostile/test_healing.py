"""Healing changes no file of the user, refuses models that do not match, and can be resumed."""

import errno
import os
import shutil
from unittest.mock import Mock

import torch
from arena import Row, rows, tried
from damage import (
    both,
    changed,
    config,
    edited,
    exchange,
    linked,
    number,
    overflow,
    pipe,
    removed,
    tensors,
    written,
)
from heal_rows import RECORD, WITH_FILE, heal, record, trainer

from healings import write_student
from isingcut.files.ownership import MARKER, mark
from isingcut.healing.patch.ridge import RidgeFit
from shared import load_json, parametrize, write_json
from tiny import tiny_checkpoint


def unfinished(arena):
    """Write the work folder of another healing that has finished its patch."""
    work = arena.here / ".healed.healing"
    work.mkdir()
    write_json(work / "identity.json", "healing-work", {"work": "a"})
    unpatched = {"cuts": [], "changed": False, "unpatched": []}
    write_json(work / "patched.json", "healing-patched", unpatched)


def changed_since(arena):
    """Write an output of isingcut to which the user added a file."""
    shutil.copytree(arena.run / "model", arena.here / "healed")
    (arena.here / "healed/notes.txt").write_text("mine")


READ = "an input of this command; nothing was written"
NOT_OURS = "the folder for unfinished work, exists and is not from"
WORK = ".healed.healing"
# Output paths that are refused even with `--overwrite`.
OUTPUTS = [
    ("teacher", "{model}", f"output .*/model is .*{READ}"),
    ("student", "{run}/model", f"output .*run/model is .*{READ}"),
    ("text", "{text}", f"output .*text.txt is .*{READ}"),
    ("all of it", "{here}", f"contains .*{READ}"),
    ("inside the student", "{run}/model/healed", f"lies in .*run/model, {READ}"),
    ("home", "{home}", "is not replaced: it has diary.txt"),
    ("a link into the student", "{here}/link/new", f"lies in .*run/model, {READ}",
     linked("link", "run/model")),
    ("ours with a file of the user's", "{here}/healed", "isingcut did not write notes.txt in it",
     changed_since),
    ("below another file", "{home}/diary.txt/healed", "cannot write"),
]  # fmt: skip
# Contents of the work folder's path that are not replaced.
KEPT = [
    ("a folder", NOT_OURS, written(f"{WORK}/notes.txt")),
    ("a file", NOT_OURS, written(WORK)),
    ("a link", NOT_OURS, linked(WORK, "home")),
    ("work of another version", NOT_OURS, written(f"{WORK}/identity.json", '"0123456789abcdef"')),
    ("another's", "has an unfinished healing with other options or models; run that command again",
     unfinished),
]  # fmt: skip
PLACES = rows((n, heal("--overwrite", out=out), *rest) for n, out, *rest in OUTPUTS)
PLACES += rows(
    (f"{name} in the work folder's place", heal(), *rest) for name, *rest in KEPT
)
PLACES += rows([
    ("there", heal(out="{home}"), "already exists, nothing was written"),
    ("a link to nothing", heal(), "healed already exists", linked("healed", "gone")),
    ("the config file", heal("--overwrite --config {here}/c.yaml", out="{here}/c.yaml"),
     f"output .*c.yaml is .*{READ}", written("c.yaml", "seed: 1\n")),
    ("the teacher in the work folder's place", heal(teacher="{here}/.healed.healing"),
     f"output .*healed.healing is .*{READ}",
     lambda a: shutil.copytree(a.model, a.here / WORK)),
])  # fmt: skip


# words and files --------------------------------------------------------------------------


WORDS = rows([
    ("unknown schedule", heal(lr_scheduler_type="cosin"),
     "the schedule .*cosin is not a valid SchedulerType"),
    ("a schedule that waits", heal(lr_scheduler_type="reduce_lr_on_plateau"),
     "lr_scheduler_type reduce_lr_on_plateau needs evaluations"),
    ("a schedule without its settings", heal(lr_scheduler_type="cosine_with_min_lr"),
     "transformers rejects .*lr_scheduler_kwargs"),
    ("batch", heal(per_device_train_batch_size=0), "batch_size must be above 0"),
    ("steps and a time", heal("--train 10min"), "--train and max_steps in .* both set"),
    ("shares of one process", heal(fsdp=True), "fsdp needs several processes; start them with"),
    ("nothing to do", heal("--method none --patch none"), "leave nothing to do"),
    ("many samples", heal("--samples 1000000"), "too short"),
    ("a pipe", WITH_FILE, "t.yaml", pipe("t.yaml")),
    ("a list", WITH_FILE, "trainer must be a section", trainer("- 1\n")),
    ("a typing error", WITH_FILE, "did you mean 'adam_beta2'", trainer("adam_beta3: 0.9\n")),
])  # fmt: skip
# Settings that a trainer section may not have, and settings with wrong values.
OTHERS = """
output_dir: /tmp/elsewhere
push_to_hub: true
report_to: [wandb]
use_cpu: false
"""
WRONG = """
adam_beta2: high
adam_beta1: 1.5
learning_rate: .nan
learning_rate: -1
num_train_epochs: 0
optim: 3
optim: nonsense
dataloader_num_workers: true
lr_scheduler_kwargs: {nonsense: 1}
"""
for said, table in (("--trainer cannot set '{}'", OTHERS), ("{}", WRONG)):
    for typed in table.strip().splitlines():
        name = typed.partition(":")[0].removesuffix("beta1")
        WORDS.append(
            Row(f"trainer: {typed}", WITH_FILE, said.format(name), trainer(typed))
        )


test_a_place_or_a_word_is_refused = tried(PLACES + WORDS)


def removed_are(*blocks, of=6):
    return record(lambda r: {**r, "removed": list(blocks), "of": of})


def another(**options):
    """Return a step that writes another teacher of the same kind, `other`."""
    return lambda arena: tiny_checkpoint("llama", arena.here / "other", **options)


def another_student(arena):
    """Write a student of other shapes with the record and depth of the cut."""
    tiny_checkpoint(
        "llama", arena.here / "student", num_hidden_layers=4, intermediate_size=64
    )
    shutil.copyfile(arena.here / RECORD, arena.here / "student/isingcut.json")


def one_bit(content):
    content[-9] ^= 1


# Without the marker a changed student is accepted.
unmarked = removed(f"run/model/{MARKER}")
UNREADABLE = "isingcut.json is not a readable record of a cut"
ANOTHER = (
    r"was cut from .*but the teacher .* is another model \(different: .*--other-teacher"
)
HEAL = heal()
OTHER = heal("--other-teacher", teacher="{here}/other")
DOWN = "model.layers.0.mlp.down_proj.weight"
STUDENT = "run/model"
SAYS = [
    ("fewer blocks", "has 4 blocks, but its record says that 1 of 6", removed_are(1)),
    ("a smaller model", "cut from a model of 5 blocks", removed_are(1, 2, of=5)),
    ("all blocks", "its record says that 6 of 6 were removed", removed_are(*range(6))),
    ("a block twice", UNREADABLE, removed_are(2, 2)),
    ("a huge model", UNREADABLE, removed_are(1, 2, of=10**12)),
    ("a list", UNREADABLE, written(RECORD, b"[1, 2]")),
]
# Damage to the student or the teacher of a healing without further options.
PLAIN = [
    ("one weight of the teacher", ANOTHER, number(DOWN, 1.0)),
    ("another base of its rotations", ANOTHER, config(rope_theta=5e5)),
    ("a student of another depth", "says 3 blocks, but the checkpoint has tensors of 4",
     config("run/model/config.json", num_hidden_layers=3)),
    ("other letters", "have different tokenizers",
     edited("run/model/tokenizer.json", exchange)),
    ("no tokenizer", "model has no tokenizer",
     lambda a: [p.unlink() for p in (a.run / "model").glob("tokenizer*")]),
    ("no record, one weight changed", "its block 0 is not a block of model at all",
     both(removed(RECORD), unmarked, number(DOWN, 1.0, STUDENT))),
    ("a student of damaged weights", "has NaN",
     both(unmarked, number(DOWN, float("nan"), STUDENT))),
    ("a student whose logits overflow",
     "the perplexity of .*run/model is NaN or infinite on the text that begins",
     both(unmarked, tensors(overflow, STUDENT))),
    ("one bit of the student's weights",
     "changed after isingcut wrote it: model.safetensors in it was changed; write it",
     changed("run/model/model.safetensors", one_bit)),
    ("another configuration of the student",
     "config.json in it was changed; write it again, or delete its .isingcut-output.json",
     config("run/model/config.json", rms_norm_eps=1e-3)),
    ("the student's marker", "its .isingcut-output.json was changed",
     written(f"{STUDENT}/{MARKER}", "{}")),
    *((f"record: {name}", *rest) for name, *rest in SAYS),
]  # fmt: skip
PAIRS = rows((name, HEAL, *rest) for name, *rest in PLAIN)
PAIRS += rows([
    ("a huge width", heal("--other-teacher"),
     "a width of 32, but the teacher .* has 10000000", config(hidden_size=10**7)),
    ("another depth", OTHER, "cut from a model of 6 blocks, but the teacher .* has 5",
     another(num_hidden_layers=5)),
    ("itself", heal("--other-teacher", teacher="{run}/model"), "of 6 blocks, but .* has 4"),
    ("another width", OTHER, "of shape .*, but block 0 of the teacher",
     another(hidden_size=48, num_attention_heads=6)),
    ("another vocabulary", OTHER, "a vocabulary of 262, but the teacher .* has 300",
     another(vocab_size=300)),
    ("a student of other shapes", heal(student="{here}/student"),
     "block 0 of .*student has a .* of shape", another_student),
    ("no teacher", heal(teacher="{here}/gone"), "there is no model at .*gone"),
    ("a run without a model", heal(student="{run}"), "run/model is not a checkpoint",
     lambda a: shutil.rmtree(a.run / "model")),
    ("no record, nothing missing", heal(student="{model}"), "has all blocks of model"),
])  # fmt: skip


test_models_that_do_not_belong_together_are_refused = tried(PAIRS)


class Stopped(Exception):
    """Raised in place of a kill, with the same effect on the files."""


def types(arena, command, **more):
    """Run a command that may make the output; return the names in its work folder."""
    more = {"code": 0, "makes": ("healed*", ".healed.healing*"), **more}
    arena.try_row(Row(command, command, **more))
    work = arena.here / ".healed.healing"
    return sorted(os.listdir(work)) if work.exists() else []


def stops(monkeypatch, step, error, part="_save_scaler"):
    """Raise while the Trainer saves the state of a step, after the weights are written."""
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
    return load_json(arena.here / out / "healing.json").steps


def half_written(arena, step):
    """Write the state of a step as a kill leaves it: some files, and no marker."""
    place = arena.here / ".healed.healing/trainer" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"half")
    (place / "trainer_state.json").write_text('{"global_step"')


def test_a_full_disk_at_the_second_state_keeps_the_first(arena, monkeypatch):
    types(arena, heal(out="{here}/whole", save_steps=1), makes=("whole*", ".whole*"))
    with monkeypatch.context() as patch:
        stops(patch, 2, FULL)
        line = "no space left .*healing was not written; .*finished work is kept in "
        left = types(arena, SAVING, code=2, line=line)
    assert left == ["before.json", "identity.json", "memory.json", "trainer"]
    half_written(arena, 3)
    assert types(arena, SAVING) == []
    assert curve(arena) == curve(arena, "whole")


def test_used_up_memory_keeps_the_states(arena, monkeypatch):
    stops(monkeypatch, 2, MemoryError())
    line = r"this machine is out of memory; .*finished work is kept in .*healing"
    assert "trainer" in types(arena, SAVING, code=2, line=line)


def test_a_full_disk_at_the_first_state_leaves_nothing(arena, monkeypatch):
    stops(monkeypatch, 1, FULL)
    arena.refuses(SAVING, "no space left .*healing was not written")


def test_half_a_state_alone_is_begun_anew(arena, monkeypatch):
    with monkeypatch.context() as patch:
        stops(patch, 1, Stopped())
        # A kill leaves no chance to clean up.
        patch.setattr("isingcut.healing.work_folder.release", Mock())
        patch.setattr("isingcut.healing.training.train.shutil.rmtree", Mock())
        left = types(arena, SAVING, code=1, line="internal error")
    assert "trainer" in left
    assert os.listdir(arena.here / ".healed.healing/trainer") == ["checkpoint-1"]
    # There is no complete state to resume from, so other options may use the folder.
    assert types(arena, heal(save_steps=1, learning_rate=1e-3)) == []
    assert len(curve(arena)) == 2


@parametrize("name", ["model.safetensors", "optimizer.pt", "healing-curve.json"])
def test_a_damaged_state_is_left_out(arena, monkeypatch, name):
    with monkeypatch.context() as patch:
        stops(patch, 2, Stopped(), part="save_model")
        types(arena, SAVING, code=1, line="internal error")
    state = arena.here / ".healed.healing/trainer/checkpoint-1"
    os.truncate(state / name, 9)
    assert types(arena, SAVING) == []
    assert [s["step"] for s in curve(arena)] == [1, 2]


@parametrize("saved", [1, 50])
def test_the_advice_after_no_number_works(arena, saved):
    # Each step shrinks weights by the rate times this; a rate of 10 makes them overflow.
    settings = {"weight_decay": 1e35, "max_steps": 4, "warmup_steps": 0}
    settings["save_steps"] = saved
    line = (
        "the loss of step . is nan; set a lower learning_rate with --trainer, here 10"
    )
    arena.refuses(heal("--patch none", **settings, learning_rate=10.0), line)
    assert types(arena, heal("--patch none", **settings, learning_rate=1e-37)) == []


@parametrize(
    "place, error",
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
    with monkeypatch.context() as patch:
        patch.setattr(place, Mock(side_effect=error))
        left = types(arena, heal(), code=2, line="no space left on the disk.*healing")
    assert (left != []) == ("save_model" not in place)
    assert types(arena, heal()) == []


def test_another_teacher_may_stand_for_the_original(arena):
    first = number("model.layers.0.mlp.down_proj.weight", 1.0)
    types(arena, heal("--other-teacher"), prepare=first)
    assert len(curve(arena)) == 2


def test_an_old_record_without_a_hash_goes_on_working(arena):
    old = record(lambda r: {"removed": r["removed"], "of": r["of"]})
    types(arena, heal(), prepare=both(old, lambda arena: mark(arena.run / "model")))


def test_a_healed_student_is_replaced(arena):
    types(arena, heal())
    types(arena, heal("--overwrite --seed 1", learning_rate=1e-2))
    assert load_json(arena.here / "healed/healing.json").options.seed == 1


def exact_cut(arena):
    """Write a student with the original's weights; the student of the run is patched."""
    removed = load_json(arena.run / "model/isingcut.json").removed
    write_student(arena.model, arena.here / "exact", removed)


def test_a_patch_that_vanished_in_rounding_says_so(arena, monkeypatch):
    def too_small(fit, held_out, left):
        return RidgeFit(torch.zeros_like(fit.tx), 1.0, 0.99)

    monkeypatch.setattr("isingcut.healing.repairs.linear.fit_ridge", too_small)
    line = r"warning: the linear patch changed nothing \(block \d's mlp.down_proj"
    command = heal("--patch linear --method none", student="{here}/exact")
    types(arena, command, line=line, prepare=exact_cut)
    found = load_json(arena.here / "healed/healing.json")
    assert found.patch.changed is False
    assert {c.changed for c in found.patch.cuts} == {False}


def test_a_sample_longer_than_the_model_says_so(arena):
    line = "warning: samples have 128 tokens instead of --length 1000000"
    types(arena, heal("--length 1000000"), line=line)
    found = load_json(arena.here / "healed/healing.json")
    # The run's own report text has samples of 16 tokens.
    assert (found.length, found.report_tokens) == (128, 3 * 15)
