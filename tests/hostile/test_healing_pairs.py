"""A healing takes no other teacher and no student that it does not know."""

import shutil

from damage import (
    both,
    changed,
    config,
    edited,
    number,
    overflow,
    pipe,
    removed,
    tensors,
    truncated,
    written,
)
from heal_rows import RECORD, heal, parametrised, record, rows

from isingcut.files.writing import MARKER
from isingcut.testing.tiny import tiny_checkpoint


def removed_are(*blocks, of=6):
    return record(lambda r: {**r, "removed": list(blocks), "of": of})


def another(**options):
    """A teacher of the same kind, `other`."""
    return lambda arena: tiny_checkpoint("llama", arena.here / "other", **options)


def another_student(arena):
    """A student of other shapes with the record and depth of the cut."""
    other = {"num_hidden_layers": 4, "intermediate_size": 64}
    tiny_checkpoint("llama", arena.here / "student", **other)
    shutil.copyfile(arena.here / RECORD, arena.here / "student/isingcut.json")


def exchange(content):
    """The student's tokenizer with two letters exchanged."""
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]


def one_bit(content):
    content[-9] ^= 1


# As a user takes a changed student on purpose.
unmarked = removed(f"run/model/{MARKER}")
UNREADABLE = "isingcut.json is no readable record of a cut"
ANOTHER = r"was cut from .* \(sha256 .*but the teacher .* is another model .*--other-teacher"
HEAL, OTHER = heal(), heal("--other-teacher", teacher="{here}/other")
DOWN, STUDENT = "model.layers.0.mlp.down_proj.weight", "run/model"
SAYS = [
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
    ("a list", UNREADABLE, written(RECORD, b"[1, 2]")),
    ("nested", "nested deeper", written(RECORD, b"[" * 100000)),
    ("cut short", "not readable as JSON", written(RECORD, b'{"removed": [1')),
    ("not UTF-8", "not readable as JSON", written(RECORD, b"\xff\xfe{}")),
    ("twice", "appears twice", written(RECORD, b'{"removed": [1], "removed": [2], "of": 6}')),
    ("a pipe", "is a pipe; expected a plain file", pipe(RECORD)),
    ("huge", "expected at most", truncated(RECORD, 2**26 + 1)),
]
# Something is wrong with the student or the teacher of a plain healing.
PLAIN = [
    ("one weight of the teacher", ANOTHER, number(DOWN, 1.0)),
    ("another base of its rotations", ANOTHER, config(rope_theta=5e5)),
    ("a student of another depth", "says 3 blocks and the checkpoint has tensors of 4",
     config("run/model/config.json", num_hidden_layers=3)),
    ("other letters", "tokenizers that read the same text differently",
     edited("run/model/tokenizer.json", exchange)),
    ("no tokenizer", "model has no tokenizer",
     lambda a: [p.unlink() for p in (a.run / "model").glob("tokenizer*")]),
    ("no record, one weight changed", "its block 0 is no block of model at all",
     both(removed(RECORD), unmarked, number(DOWN, 1.0, STUDENT))),
    ("a student of damaged weights", "holds NaN",
     both(unmarked, number(DOWN, float("nan"), STUDENT))),
    ("a student whose logits overflow",
     "the perplexity of .*run/model is NaN or infinite on the text that begins",
     both(unmarked, tensors(overflow, STUDENT))),
    ("one bit of the student's weights",
     "run/model is not as isingcut wrote it: model.safetensors in it was changed; write it",
     changed("run/model/model.safetensors", one_bit)),
    ("another configuration of the student",
     "config.json in it was changed; write it again, or delete its .isingcut-output.json",
     config("run/model/config.json", rms_norm_eps=1e-3)),
    ("the student's marker", "its .isingcut-output.json was changed",
     written(f"{STUDENT}/{MARKER}", "{}")),
    ("a student half there", "model.safetensors is truncated",
     truncated("run/model/model.safetensors", 9000)),
    *((f"record: {name}", *rest) for name, *rest in SAYS),
]  # fmt: skip
PAIRS = rows((name, HEAL, *rest) for name, *rest in PLAIN)
PAIRS += rows([
    ("another model of equal depth", heal(teacher="{here}/other"), ANOTHER, another(seed=1)),
    ("another depth", OTHER, "cut from a model of 6 blocks, but the teacher .* has 5",
     another(num_hidden_layers=5)),
    ("itself", heal("--other-teacher", teacher="{run}/model"), "of 6 blocks, but .* has 4"),
    ("another width", OTHER, "of shape .*, but block 0 of the teacher",
     another(hidden_size=48, num_attention_heads=6)),
    ("another vocabulary", OTHER, "a vocabulary of 262, but the teacher .* one of 300",
     another(vocab_size=300)),
    ("a student of other shapes", heal(student="{here}/student"),
     "block 0 of .*student has a .* of shape", another_student),
    ("no teacher", heal(teacher="{here}/gone"), "there is no model at .*gone"),
    ("a text as teacher", heal(teacher="{text}"), "text.txt is not a model"),
    ("no student", heal(student="{here}/gone"), "gone is no checkpoint"),
    ("a file as student", heal(student="{text}"), "text.txt is no checkpoint"),
    ("the run as student", heal(student="{run}"), "run is no checkpoint"),
    ("no record, nothing missing", heal(student="{model}"), "lacks no block of model"),
])  # fmt: skip


@parametrised(PAIRS)
def test_models_that_do_not_belong_together_are_refused(arena, row):
    arena.try_row(row)
