"""A healing touches nothing of the user's, takes no other teacher, and is never lost."""

import errno
import json
import os
import shutil

import pytest
import torch
from arena import Row
from safetensors.torch import load_file, save_file

from isingcut.files import write_json
from isingcut.testing.tiny import tiny_checkpoint


def heal(more="", student="{run}/model", teacher="{model}", out="{here}/healed"):
    """The command line of a tiny healing, of two steps where it gets that far."""
    return (
        f"heal {student} --teacher {teacher} --out {out} --text {{text}} --samples 6 --length 16 "
        f"--report-samples 2 --steps 2 --batch 2 --micro-batch 2 --device cpu --dtype float32 "
        f"{more}"
    )


def rows(cases, prepare=None):
    """Rows of (name, command, line, preparation)."""
    return [Row(name, command, line, *rest) for name, command, line, *rest in cases]


def parametrised(table):
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


# places -----------------------------------------------------------------------------------


def written(place, content="mine"):
    """Puts a file of the user's there."""

    def prepare(arena):
        path = arena.here / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    return prepare


def linked(place, to):
    def prepare(arena):
        (arena.here / place).symlink_to(arena.here / to, target_is_directory=True)

    return prepare


def hard_link(arena):
    os.link(arena.text, arena.here / "healed")


def unfinished(arena):
    """Work of another healing, its training done."""
    work = arena.here / ".healed.healing"
    work.mkdir()
    write_json(work / "identity.json", "healing-work", {"work": "a", "training": "b"})
    write_json(
        work / "trained.json",
        "healing-trained",
        {"steps": [], "tokens_seen": 1, "samples": 1, "processes": 1, "trained_parameters": 1},
    )


def changed_since(arena):
    """An output of ours to which the user added a file."""
    shutil.copytree(arena.run / "model", arena.here / "healed")
    (arena.here / "healed" / "notes.txt").write_text("mine", encoding="utf-8")


READ = "which this command reads; nothing was written"
NOT_OURS = "where healing keeps its unfinished work, is there and no healing"
PLACES = rows(
    [
        ("teacher", heal("--overwrite", out="{model}"), f"output .*/model is .*{READ}"),
        ("student", heal("--overwrite", out="{run}/model"), f"output .*run/model is .*{READ}"),
        ("text", heal("--overwrite", out="{text}"), f"output .*text.txt is .*{READ}"),
        ("all of it", heal("--overwrite", out="{here}"), f"contains .*{READ}"),
        ("inside the student", heal(out="{run}/model/healed"), f"lies in .*run/model, {READ[:5]}"),
        ("inside the teacher", heal(out="{model}/healed"), f"lies in .*/model, {READ[:5]}"),
        ("home", heal("--overwrite", out="{home}"), "stays as it is: it holds diary.txt"),
        ("there", heal(out="{home}"), "already exists and nothing was written"),
        (
            "a link to the teacher",
            heal("--overwrite", out="{here}/link"),
            f"output .*link is .*{READ}",
            linked("link", "model"),
        ),
        (
            "a link into the student",
            heal("--overwrite", out="{here}/link/new"),
            f"lies in .*run/model, {READ[:5]}",
            linked("link", "run/model"),
        ),
        (
            "a hard link to the text",
            heal("--overwrite"),
            f"output .*healed is .*text.txt, {READ[:5]}",
            hard_link,
        ),
        (
            "a link to nothing",
            heal(),
            "healed already exists",
            linked("healed", "gone"),
        ),
        (
            "the trainer file",
            heal("--overwrite --trainer {here}/t.yaml", out="{here}/t.yaml"),
            f"output .*t.yaml is .*{READ}",
            written("t.yaml", "weight_decay: 0.1\n"),
        ),
        (
            "the config file",
            heal("--overwrite --config {here}/c.yaml", out="{here}/c.yaml"),
            f"output .*c.yaml is .*{READ}",
            written("c.yaml", "seed: 1\n"),
        ),
        (
            "the folder of the trainer file",
            heal("--overwrite --trainer {here}/mine/t.yaml", out="{here}/mine"),
            f"output .*mine contains .*{READ}",
            written("mine/t.yaml", "weight_decay: 0.1\n"),
        ),
        (
            "ours with a file of the user's",
            heal("--overwrite"),
            "isingcut did not write notes.txt in it",
            changed_since,
        ),
        ("below a file", heal(out="{text}/healed"), "lies in .*text.txt"),
        ("below another file", heal(out="{home}/diary.txt/healed"), "cannot write"),
        ("a name too long", heal(out="{here}/" + 250 * "x"), "cannot write"),
        (
            "a folder in the work folder's place",
            heal(),
            NOT_OURS,
            written(".healed.healing/notes.txt"),
        ),
        ("a file in the work folder's place", heal(), NOT_OURS, written(".healed.healing")),
        (
            "a link in the work folder's place",
            heal(),
            NOT_OURS,
            linked(".healed.healing", "home"),
        ),
        (
            "a work folder of another version",
            heal(),
            NOT_OURS,
            written(".healed.healing/identity.json", '"0123456789abcdef"'),
        ),
        (
            "the teacher in the work folder's place",
            heal(teacher="{here}/.healed.healing"),
            f"output .*healed.healing is .*{READ}",
            lambda a: shutil.copytree(a.model, a.here / ".healed.healing"),
        ),
        (
            "another healing's work",
            heal(),
            "holds an unfinished healing with other options; type that command again",
            unfinished,
        ),
    ]
)


# a student and its teacher ----------------------------------------------------------------


def record(change):
    """Changes the record of the cut."""

    def prepare(arena):
        file = arena.run / "model" / "isingcut.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(content)), encoding="utf-8")

    return prepare


def raw_record(content):
    return lambda arena: (arena.run / "model" / "isingcut.json").write_bytes(content)


def replaced_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def removed_are(*blocks, of=6):
    return record(lambda r: {**r, "removed": list(blocks), "of": of})


def another(**options):
    """A teacher of the same kind, `other`."""
    return lambda arena: tiny_checkpoint("llama", arena.here / "other", **options)


def another_student(**options):
    """A student of other shapes with the record and depth of the cut."""

    def prepare(arena):
        tiny_checkpoint("llama", arena.here / "student", num_hidden_layers=4, **options)
        shutil.copyfile(arena.run / "model" / "isingcut.json", arena.here / "student/isingcut.json")

    return prepare


def tensors(place, change):
    def prepare(arena):
        file = arena.here / place / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return prepare


def first_weight(found, value):
    found["model.layers.0.mlp.down_proj.weight"][0, 0] = value


def config(place, **changes):
    def prepare(arena):
        file = arena.here / place / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return prepare


def other_letters(arena):
    """The student's tokenizer with two letters exchanged."""
    file = arena.run / "model" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    file.write_text(json.dumps(content), encoding="utf-8")


def without_record(*then):
    def prepare(arena):
        (arena.run / "model" / "isingcut.json").unlink()
        for each in then:
            each(arena)

    return prepare


UNREADABLE = "isingcut.json is no readable record of a cut"
ANOTHER = r"was cut from .* \(sha256 .*but the teacher .* is another model .*--other-teacher"
PAIRS = rows(
    [
        (
            "another model of equal depth",
            heal(teacher="{here}/other"),
            ANOTHER,
            another(seed=1),
        ),
        (
            "one weight changed",
            heal(),
            ANOTHER,
            tensors("model", lambda t: first_weight(t, 1.0)),
        ),
        ("another base of its rotations", heal(), ANOTHER, config("model", rope_theta=5e5)),
        (
            "another depth",
            heal("--other-teacher", teacher="{here}/other"),
            "cut from a model of 6 blocks, but the teacher .* has 5",
            another(num_hidden_layers=5),
        ),
        ("itself", heal("--other-teacher", teacher="{run}/model"), "of 6 blocks, but .* has 4"),
        (
            "another width",
            heal("--other-teacher", teacher="{here}/other"),
            "of shape .*, but block 0 of the teacher",
            another(hidden_size=48, num_attention_heads=6),
        ),
        (
            "another vocabulary",
            heal("--other-teacher", teacher="{here}/other"),
            "a vocabulary of 262, but the teacher .* one of 300",
            another(vocab_size=300),
        ),
        (
            "a student of other shapes",
            heal(student="{here}/student"),
            "block 0 of .*student has a .* of shape",
            another_student(intermediate_size=64),
        ),
        (
            "a student of another depth",
            heal(),
            "says 3 blocks and the checkpoint has tensors of 4",
            config("run/model", num_hidden_layers=3),
        ),
        ("other letters", heal(), "tokenizers that read the same text differently", other_letters),
        (
            "no tokenizer",
            heal(),
            "model has no tokenizer",
            lambda a: [p.unlink() for p in (a.run / "model").glob("tokenizer*")],
        ),
        ("no teacher", heal(teacher="{here}/gone"), "there is no model at .*gone"),
        ("a text as teacher", heal(teacher="{text}"), "text.txt is not a model"),
        ("no student", heal(student="{here}/gone"), "gone is no checkpoint"),
        ("a file as student", heal(student="{text}"), "text.txt is no checkpoint"),
        ("the run as student", heal(student="{run}"), "run is no checkpoint"),
        (
            "no record, streamed",
            heal("--stream-teacher --top-k 4"),
            "no record of its cut; .*leave --stream-teacher out",
            without_record(),
        ),
        (
            "no record, one weight changed",
            heal(),
            "its block 0 is no block of model at all",
            without_record(tensors("run/model", lambda t: first_weight(t, 1.0))),
        ),
        ("no record, nothing missing", heal(student="{model}"), "lacks no block of model"),
        (
            "a student of damaged weights",
            heal(),
            "NaN|no numbers",
            tensors("run/model", lambda t: first_weight(t, float("nan"))),
        ),
        (
            "a student half there",
            heal(),
            "model.safetensors is truncated",
            lambda a: os.truncate(a.run / "model" / "model.safetensors", 9000),
        ),
    ]
)
PAIRS += rows(
    [
        (f"record: {name}", heal(), line, prepare)
        for name, line, prepare in (
            ("other blocks", "is block .* of the teacher .*, but by its record", removed_are(0, 5)),
            ("fewer blocks", "has 4 blocks, but its record says that 1 of 6", removed_are(1)),
            ("a smaller model", "cut from a model of 5 blocks", removed_are(1, 2, of=5)),
            ("no blocks", UNREADABLE, removed_are()),
            ("all blocks", UNREADABLE, removed_are(*range(6))),
            ("a block twice", UNREADABLE, removed_are(2, 2)),
            ("a negative block", UNREADABLE, removed_are(-1, 2)),
            ("a block beyond", UNREADABLE, removed_are(2, 6)),
            ("truth values", UNREADABLE, removed_are(True, 2)),
            ("words", UNREADABLE, removed_are("1", "2")),
            ("fractions", UNREADABLE, removed_are(1.0, 2.5)),
            ("a huge model", UNREADABLE, removed_are(1, 2, of=10**12)),
            ("no list", UNREADABLE, record(lambda r: {**r, "removed": 10**9})),
            ("a hash of a wrong type", UNREADABLE, record(lambda r: {**r, "model": {"sha256": 1}})),
            ("a model of a wrong type", UNREADABLE, record(lambda r: {**r, "model": ["x"]})),
            ("a list", UNREADABLE, raw_record(b"[1, 2]")),
            ("nested", "nested deeper", raw_record(b"[" * 100000)),
            ("cut short", "not readable as JSON", raw_record(b'{"removed": [1')),
            ("not UTF-8", "not readable as JSON", raw_record(b"\xff\xfe{}")),
            ("twice", "appears twice", raw_record(b'{"removed": [1], "removed": [2], "of": 6}')),
            (
                "a pipe",
                "is a pipe; expected a plain file",
                lambda a: replaced_by_fifo(a.run / "model" / "isingcut.json"),
            ),
            (
                "huge",
                "expected at most",
                lambda a: os.truncate(a.run / "model" / "isingcut.json", 2**26 + 1),
            ),
        )
    ]
)


# words and files --------------------------------------------------------------------------


def block_0_missing(arena):
    """A cut that lacks its first blocks only."""
    from isingcut.models.cutting.checkpoint import excise

    more = {"isingcut.json": json.dumps({"removed": [0, 1], "of": 6})}
    excise(arena.model, [0, 1], arena.here / "headless", extra_files=more)


def trainer(content):
    """A trainer file with that content."""
    return written("t.yaml", content)


WITH_FILE = heal("--trainer {here}/t.yaml")
WORDS = rows(
    [
        ("more answers than words", heal("--top-k 263"), "--top-k 263 is more than the 262 tokens"),
        ("many more", heal("--top-k 1000000"), "--top-k .* is more than the 262 tokens"),
        ("answers and warmth", heal("--top-k 4 --temperature 2"), "--top-k keeps the teacher at"),
        ("answers and states", heal("--top-k 4 --hidden-weight 1"), "--top-k keeps no hidden"),
        ("stream without answers", heal("--stream-teacher"), "--stream-teacher needs --top-k"),
        (
            "states before nothing",
            heal("--hidden-weight 1", student="{here}/headless"),
            "--hidden-weight matches .* lacks its first blocks only",
            block_0_missing,
        ),
        (
            "a patch before nothing",
            heal("--patch linear --method none", student="{here}/headless"),
            "block 0 is removed, so that nothing stands before",
            block_0_missing,
        ),
        ("rank", heal("--method lora --lora-rank 33"), "--lora-rank 33 is more than"),
        ("unknown schedule", heal("--schedule cosin"), "--schedule must be one of .*got 'cosin'"),
        (
            "a schedule that waits",
            heal("--schedule reduce_lr_on_plateau"),
            "--schedule reduce_lr_on_plateau falls when",
        ),
        (
            "a schedule without its settings",
            heal("--schedule cosine_with_min_lr"),
            "does not take its settings .*lr_scheduler_kwargs",
        ),
        ("rate", heal("--learning-rate nan"), "learning.rate"),
        ("endless rate", heal("--learning-rate inf"), "learning.rate"),
        ("negative rate", heal("--learning-rate -1"), "learning.rate"),
        ("warmth", heal("--temperature nan"), "temperature"),
        ("epochs", heal("--epochs inf"), "epochs"),
        ("hidden weight", heal("--hidden-weight nan"), "hidden.weight"),
        ("seed", heal("--seed -1"), "seed"),
        ("no steps", heal("--steps 0"), "--steps must be at least 1"),
        ("batch", heal("--batch 3"), "--batch 3 must be a multiple of --micro-batch"),
        ("device", heal("--device tpu"), "--device: must be auto, cpu"),
        ("method", heal("--method qlora"), "--method must be one of"),
        ("nothing to do", heal("--method none"), "leaves nothing to do"),
        ("many samples", heal("--samples 1000000"), "too short"),
        ("no file", WITH_FILE, "t.yaml"),
        ("a pipe", WITH_FILE, "t.yaml", lambda a: os.mkfifo(a.here / "t.yaml")),
        ("a device", heal("--trainer /dev/zero"), "/dev/zero"),
        ("a list", WITH_FILE, "t.yaml must hold", trainer("- 1\n")),
        ("a typing error", WITH_FILE, "did you mean 'adam_beta2'", trainer("adam_beta3: 0.9\n")),
    ]
)
WORDS += [
    Row(f"trainer sets {key}", WITH_FILE, f"--trainer cannot set '{key}'", trainer(line))
    for key, line in (
        (line.partition(":")[0], line)
        for line in (
            "output_dir: /tmp/elsewhere",
            "push_to_hub: true",
            "hub_token: hf_x",
            "hub_model_id: someone/else",
            "hub_strategy: every_save",
            "report_to: [wandb]",
            "run_name: x",
            "logging_dir: /tmp/elsewhere",
            "logging_strategy: steps",
            "trackio_space_id: x/y",
            "resume_from_checkpoint: /tmp/elsewhere",
            "save_total_limit: 0",
            "save_strategy: 'no'",
            "max_steps: 1000000",
            "load_best_model_at_end: true",
            "eval_strategy: steps",
            "auto_find_batch_size: true",
            "remove_unused_columns: true",
            "use_cpu: false",
            "local_rank: 3",
        )
    )
]
WORDS += [
    Row(f"trainer: {line}", WITH_FILE, line.partition(":")[0], trainer(line))
    for line in (
        "adam_beta2: high",
        "adam_beta1: 1.5",
        "adam_epsilon: 0",
        "weight_decay: .nan",
        "weight_decay: -1",
        "max_grad_norm: .inf",
        "optim: 3",
        "optim: [adamw_torch]",
        "optim: nonsense",
        "bf16: 'yes'",
        "dataloader_num_workers: 100000",
        "dataloader_num_workers: true",
        "lr_scheduler_kwargs: 3",
        "lr_scheduler_kwargs: {nonsense: 1}",
    )
]


@parametrised(PLACES + PAIRS + WORDS)
def test_a_healing_that_is_refused(arena, row):
    arena.try_row(row)


# healings that stop half-way --------------------------------------------------------------


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


SAVING = heal("--save-steps 1")
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
    whole = heal("--save-steps 1", out="{here}/whole")
    types(arena, whole, makes=("whole*", ".whole*"))
    with monkeypatch.context() as patch:
        stops(patch, 2, FULL)
        line = r"no space left on the disk .*checkpoint-2; .*what was finished is kept in .*healing"
        left = types(arena, SAVING, code=2, line=line)
    assert left == ["before.json", "identity.json", "trainer"]
    states = sorted(p.name for p in (arena.here / ".healed.healing/trainer").iterdir())
    assert states == ["checkpoint-1"]
    half_written(arena, 3)
    assert types(arena, SAVING) == []
    assert curve(arena) == curve(arena, "whole")


def test_a_full_disk_at_the_first_state_leaves_nothing(arena, monkeypatch):
    stops(monkeypatch, 1, FULL)
    assert types(arena, SAVING, code=2, line="no space left .*checkpoint-1", makes=()) == []


def test_half_a_state_alone_is_begun_anew(arena, monkeypatch):
    with monkeypatch.context() as patch:
        stops(patch, 1, Stopped())
        # A kill leaves no chance to clean up.
        patch.setattr("isingcut.healing.work_folder._drop", lambda work, names: None)
        patch.setattr("isingcut.healing.training.train.shutil.rmtree", lambda *a, **k: None)
        left = types(arena, SAVING, code=1, line="internal error")
    assert "trainer" in left
    assert [p.name for p in (arena.here / ".healed.healing/trainer").iterdir()] == ["checkpoint-1"]
    # Nothing in it is worth going on from, so that other options may take its place.
    assert types(arena, heal("--save-steps 1 --learning-rate 1e-3")) == []
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
DECAY = trainer("weight_decay: 1e+35\n")


@pytest.mark.parametrize("saved", [1, 50])
def test_the_advice_after_no_number_works(arena, saved):
    more = (
        f"--save-steps {saved} --steps 4 --warmup-steps 0 --trainer {{here}}/t.yaml --learning-rate"
    )
    line = "the loss of step . is nan; lower --learning-rate, here 10"
    assert types(arena, heal(f"{more} 10"), code=2, line=line, makes=(), prepare=DECAY) == []
    assert types(arena, heal(f"{more} 1e-37")) == []


def test_a_last_step_without_numbers(arena):
    more = "--steps 1 --warmup-steps 0 --trainer {here}/t.yaml --learning-rate 10"
    line = "last step left weights that are no numbers; lower --learning-rate, here 10"
    blown = trainer("weight_decay: 1e+38\n")
    assert types(arena, heal(more), code=2, line=line, makes=(), prepare=blown) == []


def test_a_finished_patch_outlives_a_training_without_numbers(arena, monkeypatch):
    more = "--patch linear --steps 4 --warmup-steps 0 --trainer {here}/t.yaml --learning-rate"
    line = "loss of step . is nan; .*what was finished is kept in .*healing"
    left = types(arena, heal(f"{more} 10"), code=2, line=line, prepare=DECAY)
    assert left == ["before.json", "identity.json", "patched", "patched.json"]

    def refused(*arguments, **rest):
        raise AssertionError("patched again")

    monkeypatch.setattr("isingcut.healing.healers.linear_patch.LinearPatch.heal", refused)
    assert types(arena, heal(f"{more} 1e-37")) == []
    other = heal("--patch linear --patch-maps writes")
    (arena.here / "healed").rename(arena.here / "away")
    assert types(arena, other, code=1, line="patched again", makes=()) == []


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("isingcut.healing.healers.distill._publish", FULL),
        ("isingcut.healing.heal.healed_card", FULL),
        (
            "isingcut.healing.training.train._Trainer.save_model",
            RuntimeError("unexpected pos 5 vs 3"),
        ),
    ],
)
def test_a_full_disk_after_the_training(arena, monkeypatch, place, error):
    def full(*arguments, **rest):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        left = types(arena, heal(), code=2, line="no space left on the disk .*healing")
    assert (left != []) == ("save_model" not in place)
    assert types(arena, heal()) == []


def test_a_full_disk_under_the_kept_answers(arena, monkeypatch):
    def full(*arguments):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        line = "no space left on the disk while writing .*targets"
        assert types(arena, heal("--top-k 4"), code=2, line=line, makes=()) == []
    assert types(arena, heal("--top-k 4")) == []


def test_another_teacher_may_stand_for_the_original(arena):
    first = tensors("model", lambda t: first_weight(t, 1.0))
    types(arena, heal("--other-teacher"), prepare=first)
    assert len(curve(arena)) == 2


def test_an_old_record_without_a_hash_goes_on_working(arena):
    types(arena, heal(), prepare=record(lambda r: {"removed": r["removed"], "of": r["of"]}))


def test_a_healed_student_is_healed_again(arena):
    """Its weights are no longer the teacher's, and its record still holds."""
    types(arena, heal("--learning-rate 1e-2"))
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


def test_a_patch_that_changed_nothing_says_so(arena, monkeypatch):
    from isingcut.healing.healers import linear_patch
    from isingcut.healing.patch.least_squares import Solution

    def none_is_better(fit, held_out):
        return Solution(torch.zeros_like(fit.tx), None, 1.0)

    monkeypatch.setattr(linear_patch, "solve", none_is_better)
    line = r"warning: the linear patch changed nothing \(block \d's mlp.down_proj"
    types(arena, heal("--patch linear --method none"), line=line)
    found = json.loads((arena.here / "healed" / "healing.json").read_text(encoding="utf-8"))
    assert found["patch"]["changed"] is False
    assert {c["changed"] for c in found["patch"]["cuts"]} == {False}


def test_a_sample_longer_than_the_model_says_so(arena):
    line = "warning: samples have 128 tokens instead of --length 1000000"
    types(arena, heal("--length 1000000"), line=line)
    found = json.loads((arena.here / "healed" / "healing.json").read_text(encoding="utf-8"))
    assert (found["length"], found["report_tokens"]) == (128, 2 * 127)


# benchmarks -------------------------------------------------------------------------------


def asked(*records, task="arc_easy/test"):
    """A folder of questions, `data`."""

    def prepare(arena):
        path = arena.here / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return prepare


def special(make):
    def prepare(arena):
        (arena.here / "data" / "arc_easy").mkdir(parents=True)
        make(arena.here / "data" / "arc_easy" / "test.jsonl")

    return prepare


def huge(path):
    path.touch()
    os.truncate(path, 2**28 + 1)


def evaluate(more="--tasks arc_easy --data {here}/data", out="{here}/scores.json"):
    return f"evaluate {{run}}/model --original {{model}} --out {out} --device cpu {more}"


GOOD = {"context": "Which is it?", "choices": ["one", "two"], "answer": 1}
ANSWER = r"question 2: expected 'answer', a number from 0 to 1, got"
CHOICES = r"question 2: expected .*'choices'"
BENCHMARKS = [
    Row(f"question: {name}", evaluate(), line, asked(GOOD, {**GOOD, **change}))
    for name, line, change in (
        ("an answer beyond", ANSWER, {"answer": 2}),
        ("a negative answer", ANSWER, {"answer": -1}),
        ("a letter as answer", ANSWER, {"answer": "B"}),
        ("a truth value as answer", ANSWER, {"answer": True}),
        ("no answer", ANSWER, {"answer": None}),
        ("one choice", CHOICES, {"choices": ["one"], "answer": 0}),
        ("no choices", CHOICES, {"choices": []}),
        ("numbers as choices", CHOICES, {"choices": [1, 2]}),
        ("a text as choices", CHOICES, {"choices": "one two"}),
        ("many choices", CHOICES, {"choices": ["x"] * 1000}),
        ("no context", "question 2: expected a text 'context', got ''", {"context": ""}),
        ("a number as context", "question 2: expected a text 'context', got 7", {"context": 7}),
    )
]
BENCHMARKS += rows(
    [
        (f"questions: {name}", evaluate(), line, prepare)
        for name, line, prepare in (
            ("no JSON", "line 2: it is no JSON", asked(GOOD, "{")),
            ("a list", "line 2: expected an object", asked(GOOD, "[1]")),
            ("no number", "line 2: it is no JSON", asked(GOOD, '{"answer": NaN}')),
            ("nested", "line 2: it is no JSON .*nested", asked(GOOD, "[" * 100000)),
            ("nothing", "holds no questions", asked("")),
            ("a pipe", "is a pipe; expected a plain file", special(os.mkfifo)),
            ("a folder", "is a folder; expected a plain file", special(os.mkdir)),
            ("huge", "has 268435457 bytes; expected at most", special(huge)),
            (
                "not UTF-8",
                "is not UTF-8 text",
                special(lambda p: p.write_bytes(b'{"context": "\xff"}')),
            ),
            ("a link to nothing", "is a link to nothing", special(lambda p: p.symlink_to("gone"))),
            ("missing", "there is no file .*arc_easy/test.jsonl", asked(GOOD, task="piqa/val")),
            ("no folder", "--data .*data is no folder", lambda a: None),
        )
    ]
)
BENCHMARKS += rows(
    [
        ("unknown task", evaluate("--tasks zorp --data {here}/data"), "unknown local", asked(GOOD)),
        ("no task", evaluate("--tasks , --data {here}/data"), "names no benchmark", asked(GOOD)),
        ("no tasks", evaluate("--data {here}/data"), "names no benchmark", asked(GOOD)),
        ("no questions", evaluate("--tasks arc_easy --questions 0"), "Invalid value|questions"),
        ("text without data", evaluate("--tasks wikitext2"), "wikitext2 is read from a folder"),
        (
            "an article without text",
            evaluate("--tasks wikitext2 --data {here}/data"),
            "article 1: expected a text 'text', got 7",
            asked({"text": 7}, task="wikitext2/test_raw"),
        ),
        (
            "no blank",
            evaluate("--tasks winogrande --data {here}/data"),
            "question 1: expected '_' in 'context'",
            asked(GOOD, task="winogrande/dev"),
        ),
        (
            "three choices of four",
            evaluate("--tasks mmlu_0shot --data {here}/data"),
            "question 1: expected 4 'choices', got 2",
            asked({**GOOD, "subject": "x"}, task="mmlu/test"),
        ),
        (
            "one word",
            evaluate("--tasks lambada --data {here}/data"),
            "question 1: expected ' ' in 'text'",
            asked({"text": "one"}, task="lambada/test"),
        ),
        (
            "a run, an unknown task",
            "evaluate {run} --tasks zorp --data {here}/data",
            "unknown local task 'zorp'",
            asked(GOOD),
        ),
        (
            "the questions as output",
            evaluate(out="{here}/data/arc_easy/test.jsonl"),
            "lies in .*data, which this command reads",
            asked(GOOD),
        ),
        (
            "a user's file as output",
            evaluate("--tasks arc_easy --data {here}/data --overwrite", out="{home}/diary.txt"),
            "stays as it is",
            asked(GOOD),
        ),
        (
            "the model as output",
            evaluate("--tasks arc_easy --data {here}/data --overwrite", out="{model}/config.json"),
            "lies in .*model, which this command reads",
            asked(GOOD),
        ),
    ]
)


@parametrised(BENCHMARKS)
def test_questions_that_are_refused(arena, row):
    arena.try_row(row)
