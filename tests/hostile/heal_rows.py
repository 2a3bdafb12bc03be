"""Command lines of tiny healings, and ways to make their files hostile."""

import itertools
import json
import tempfile
from pathlib import Path

import pytest
from arena import Row
from safetensors.torch import load_file, save_file

FILES = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()


def heal(more="", student="{run}/model", teacher="{model}", out="{here}/healed", **settings):
    """The command line of a tiny healing, of two steps where it gets that far.

    Args:
        settings: of its trainer file.
    """
    file = Path(FILES.name) / f"{next(NUMBERS)}.yaml"
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, **settings}
    file.write_text(json.dumps(settings), encoding="utf-8")
    return (
        f"heal {student} --teacher {teacher} --out {out} --text {{text}} --samples 6 --length 16 "
        f"--report-samples 2 --trainer {file} --device cpu --dtype float32 {more}"
    )


def rows(cases, prepare=None):
    """Rows of (name, command, line, preparation)."""
    return [Row(name, command, line, *rest) for name, command, line, *rest in cases]


def parametrised(table):
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


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


def record(change):
    """Changes the record of the cut."""

    def prepare(arena):
        file = arena.run / "model" / "isingcut.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(content)), encoding="utf-8")

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


def trainer(content):
    """A trainer file with that content."""
    return written("t.yaml", content)


WITH_FILE = heal("--trainer {here}/t.yaml")
