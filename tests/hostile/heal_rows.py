"""Command lines of tiny healings, and ways to make their files hostile."""

import itertools
import tempfile
import textwrap
from pathlib import Path

from damage import edited, written

from shared import save_json

FILES = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()


def heal(
    more="", student="{run}/model", teacher="{model}", out="{here}/healed", **settings
):
    """Return the command line of a tiny healing, of two steps if it gets that far.

    Args:
        settings: entries of its `trainer` section.
    """
    file = Path(FILES.name) / f"{next(NUMBERS)}.yaml"
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, **settings}
    save_json(file, {"trainer": settings})
    return (
        f"heal {student} --teacher {teacher} --out {out} --text {{text}} --samples 6 --length 16 "
        f"--report-samples 2 --config {file} --device cpu --dtype float32 {more}"
    )


RECORD = "run/model/isingcut.json"


def record(change):
    """Change the record of the cut."""
    return edited(RECORD, change)


def trainer(content):
    """Write a config file with that content in its `trainer` section."""
    return written("t.yaml", "trainer:\n" + textwrap.indent(content, "  "))


WITH_FILE = heal("--config {here}/t.yaml")
