"""A tiny teacher and its cut student, healed once, for the tests of healing."""

import contextlib

import numpy as np

from isingcut.healing.heal import heal
from isingcut.options.declaration import options_from
from shared import (
    HealConfig,
    flags,
    load_json,
    module_fixture,
    save_json,
    write_jsonl,
)
from tiny import excise, read_checkpoint, tiny_checkpoint

REMOVED = (2, 3)
WORDS = [
    "cold",
    "river",
    "ran",
    "below",
    "stone",
    "bridge",
    "while",
    "old",
    "farmers",
    "spoke",
]


def write_text(path, documents):
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, 12)) + f" {i}." for i in range(documents))
    write_jsonl(path, [{"text": text} for text in texts])
    return path


def write_student(teacher, out, removed=REMOVED):
    """Write the exact cut of a teacher, with the record of its blocks."""
    excise(teacher, removed, out)
    of = load_json(teacher / "config.json").num_hidden_layers
    save_json(out / "isingcut.json", {"removed": removed, "of": of})


@module_fixture
def models(tmp_path_factory):
    """Folder with `teacher`, `student` (without blocks 2 and 3) and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("heal")
    write_student(tiny_checkpoint("llama", folder / "teacher"), folder / "student")
    write_text(folder / "text.jsonl", 80)
    return folder


TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 3e-3,
}


def options(models, out, training=None, **changes):
    """Return the options of a short healing.

    Args:
        training: entries of its `trainer` section, added to `TRAINING`.
    """
    if "trainer" not in changes:
        changes["trainer"] = {**TRAINING, **(training or {})}
    base = {
        "student": models / "student",
        "teacher": models / "teacher",
        "text": models / "text.jsonl",
        "out": out,
        "length": 32,
        "report_samples": 4,
        "patch": "none",
        "dtype": "float32",
        "device": "cpu",
    }
    return options_from(HealConfig, {**base, **changes}, "test")


def flags_of(config):
    """Return the options as command-line flags, without the student."""
    given = {k: v for k, v in vars(config).items() if v not in (None, False, "")}
    del given["student"]
    return flags(given)


def result(folder):
    return load_json(folder / "healing.json")


def curve(folder):
    return result(folder).steps


@module_fixture
def healed(models):
    return heal(options(models, models / "healed"))


class Killed(Exception):
    pass


def killing(after):
    """Return a progress that raises `Killed` after that many training steps."""

    @contextlib.contextmanager
    def progress(description, total):
        class _Bar:
            done = 0.0

            def advance(self, steps=1, note=""):
                self.done += steps
                if description.startswith("healing") and self.done >= after:
                    raise Killed

        yield _Bar()

    return progress


def stored(folder):
    found = read_checkpoint(folder).items()
    return {n: t.file.read_bytes()[t.start : t.start + t.size] for n, t in found}


def shapes(folder):
    return {n: (t.shape, t.dtype) for n, t in read_checkpoint(folder).items()}
