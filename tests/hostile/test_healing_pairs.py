"""A healing takes no other teacher and no student that it does not know."""

import json
import os
import shutil

from heal_rows import config, first_weight, heal, parametrised, record, rows, tensors
from model_files import both, overflow

from isingcut.files.writing import MARKER
from isingcut.testing.tiny import tiny_checkpoint


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


def other_letters(arena):
    """The student's tokenizer with two letters exchanged."""
    file = arena.run / "model" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    file.write_text(json.dumps(content), encoding="utf-8")


def unmarked(arena):
    """As a user takes a changed student on purpose."""
    (arena.run / "model" / MARKER).unlink()


def one_bit(arena):
    file = arena.run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def without_record(*then):
    def prepare(arena):
        (arena.run / "model" / "isingcut.json").unlink()
        for each in then:
            each(arena)

    return prepare


UNREADABLE = "isingcut.json is not a readable record of a cut"
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
            "of shape .*, but .* block 0 of the teacher",
            another(hidden_size=48, num_attention_heads=6),
        ),
        (
            "another vocabulary",
            heal("--other-teacher", teacher="{here}/other"),
            "a vocabulary of 262, but the teacher .* has 300",
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
            "says 3 blocks, but the checkpoint has tensors of 4",
            config("run/model", num_hidden_layers=3),
        ),
        ("other letters", heal(), "have different tokenizers", other_letters),
        (
            "no tokenizer",
            heal(),
            "model has no tokenizer",
            lambda a: [p.unlink() for p in (a.run / "model").glob("tokenizer*")],
        ),
        ("no teacher", heal(teacher="{here}/gone"), "there is no model at .*gone"),
        ("a text as teacher", heal(teacher="{text}"), "text.txt is not a model"),
        ("no student", heal(student="{here}/gone"), "gone is not a checkpoint"),
        ("a file as student", heal(student="{text}"), "text.txt is not a checkpoint"),
        ("the run as student", heal(student="{run}"), "run is not a checkpoint"),
        (
            "no record, one weight changed",
            heal(),
            "its block 0 is not a block of model at all",
            without_record(unmarked, tensors("run/model", lambda t: first_weight(t, 1.0))),
        ),
        ("no record, nothing missing", heal(student="{model}"), "has all blocks of model"),
        (
            "a student of damaged weights",
            heal(),
            "has NaN",
            both(unmarked, tensors("run/model", lambda t: first_weight(t, float("nan")))),
        ),
        (
            "a student whose logits overflow",
            heal(),
            "the perplexity of .*run/model is NaN or infinite on the text that begins",
            both(unmarked, tensors("run/model", overflow)),
        ),
        (
            "one bit of the student's weights",
            heal(),
            "changed after isingcut wrote it: model.safetensors in it was changed; write it",
            one_bit,
        ),
        (
            "another configuration of the student",
            heal(),
            "config.json in it was changed; write it again, or delete its .isingcut-output.json",
            config("run/model", rms_norm_eps=1e-3),
        ),
        (
            "the student's marker",
            heal(),
            "its .isingcut-output.json was changed",
            lambda a: (a.run / "model" / MARKER).write_text("{}", encoding="utf-8"),
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
                "is a pipe; expected a regular file",
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


@parametrised(PAIRS)
def test_models_that_do_not_belong_together_are_refused(arena, row):
    arena.try_row(row)
