"""Tests of the study of published states, on a tiny model and on a hand-made stage."""

import math

import pytest

from isingcut import open_run
from studies import runner
from studies.healing.study import judged_stage
from studies.published.study import Published, kl_over


def test_both_states_are_judged_at_every_stage(tiny, tmp_path):
    states = tmp_path / "states.json"
    runner.write(states, {"2": {"published": [3, 1]}})
    words = [*tiny, f"--work={tmp_path}/work", "--remove=2", f"--states={states}"]
    words += ["--methods", "isingcut", "published", "before-last"]
    words += ["--tasks=arc_easy", "--questions=6", "--patch-tokens=960"]
    words += ["--batch=2", "--samples=40", "--steps=1"]
    runner.run(Published, words)
    results = tmp_path / "published.json"
    runner.run(Published, [*words, "--collect", "--results", str(results)])
    rows = runner.read(results)["removals"]["2"]
    chosen = open_run(tmp_path / "work/run-2").chosen
    assert rows["isingcut"]["removed"] == sorted(chosen.removed)
    assert rows["published"]["removed"] == [1, 3]
    assert rows["before-last"]["removed"] == [3, 4]
    figures = Published.show(runner.read(results))
    for stage in ("cut", "least_squares", "patched", "healed"):
        assert figures[f"published_kl_over_ours_{stage}"] > 0
        assert f"published_points_minus_ours_{stage}_95" in figures


def test_the_error_of_a_ratio_is_paired():
    def stage(kl):
        sample = {"kl": kl, "nll": [0.0, 0.0], "counts": [1, 1]}
        return judged_stage({"c4": sample}, {"c4": sample})

    assert kl_over(stage([1.0, 3.0]), stage([2.0, 6.0])) == (2.0, 0.0)
    # Above twice the first by 1 and -1.
    ratio, error = kl_over(stage([1.0, 3.0]), stage([3.0, 5.0]))
    assert (ratio, error) == (2.0, pytest.approx(math.sqrt(2 * 2) / 2 / 2))
