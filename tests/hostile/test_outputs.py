"""Nothing of the user's is replaced, with `--overwrite` or without."""

import shutil

import pytest
from arena import Row


def home_with_model(arena):
    """A home folder in which the user keeps a model of that name."""
    shutil.copytree(arena.model, arena.home / "model")


STAYS = r"stays as it is: .*--overwrite replaces only what isingcut wrote"
ROWS = [
    Row(
        "run into a home folder",
        "run {model} --remove 2 --calibration {text} --length 16 --out {home} --overwrite",
        STAYS,
        home_with_model,
    ),
    Row(
        "report over the user's own",
        "report {run}",
        STAYS,
        lambda a: (a.run / "report.md").write_text("mine", encoding="utf-8"),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_nothing_of_the_users_is_replaced(arena, row):
    arena.try_row(row)
