"""Tests of the benchmark of healing speed, on a tiny model."""

from __future__ import annotations

import pytest

import healing_speed


def test_every_side_of_ours_runs_to_its_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sides = ["teacher", "student", "ours", "plain"]
    given = ["--length=16", "--batch=2", "--steps=3", "--repeats=1"]
    healing_speed.main(["--tiny", *given, "--sides", *sides])
    lines = capsys.readouterr().out.splitlines()
    figures = dict(line.split(": ") for line in lines if line.startswith("healing_"))
    assert set(figures) == {"healing_cost_over_ideal", "healing_speedup_over_plain"}
    assert all(float(value) > 0 for value in figures.values())


def test_steps_that_are_all_warm_up_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        healing_speed.main(["--tiny", "--steps=2"])
    assert "--steps must be 3 or more" in capsys.readouterr().err


def test_the_figures_are_ratios_of_medians() -> None:
    seconds = {
        "teacher": [1.0],
        "student": [3.0, 9.0, 3.0],
        "ours": [5.0],
        "gkd": [7.5],
    }
    found = healing_speed.figures(seconds)
    assert found == pytest.approx(
        {"healing_cost_over_ideal": 1.25, "healing_speedup_over_trl": 1.5}
    )
