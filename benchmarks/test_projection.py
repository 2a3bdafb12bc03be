"""Tests of the projection; counts of a search are given, because a search takes half a minute."""

from __future__ import annotations

import itertools

import pytest

import projection
from isingcut.runs.trials import DEEP, TRIED

COUNTS = projection.Counts(
    27.0, 68.0, 31.0, 505.0, 15.0, (14, 15, 16, 18, 22, 23, 27, 31)
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> projection.Model:
    """An 8B without 8 of 32 blocks."""
    monkeypatch.setattr(projection, "count", lambda n, removed: COUNTS)
    return projection.Model(projection.MODELS["8B"], 0.25)


def counts_of(parts: list[projection.Part] | None) -> dict[str, float]:
    """Return the counts of a stage by name."""
    found: dict[str, float] = {}
    for term in itertools.chain(*parts or []):
        found[term.name] = found.get(term.name, 0.0) + term.count
    return found


def test_every_path_has_its_parts_and_ranges(model: projection.Model) -> None:
    setting = projection.Setting(model, "1 x 80 GB")
    for parts in setting.stages().values():
        for fast, slow in map(projection.seconds, parts or []):
            assert 0 <= fast <= slow
    # The host tunes where the card has no room for the optimiser.
    for machine, place in (("1 x 80 GB", "card"), ("1 x 24 GB", "host")):
        patch = counts_of(projection.Setting(model, machine).stages()["patch"])
        assert patch[f"AdamW, {place}"] > 0
        assert (patch["gradients and weights"] > 0) == (place == "host")
    # A deep cut also fits a patch for every state of its search.
    shallow = counts_of(setting.rank())
    model.removed = round(DEEP * model.n) + 1
    assert shallow["text"] == TRIED
    assert counts_of(setting.rank())["maps"] > 10 * shallow["maps"]


def test_every_table_says_that_nothing_was_measured(
    model: projection.Model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["projection.py", "8B"])
    projection.main()
    before, *tables = capsys.readouterr().out.split("\n\n| ")
    assert len(tables) == 2
    assert all(projection.NOTE in text for text in (before, tables[0]))
