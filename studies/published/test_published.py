"""Tests of the study of published states, on a tiny model and on hand-made results."""

import math

import pytest

from isingcut import open_run
from studies import runner
from studies.healing.study import judged_stage
from studies.published.study import Published


def test_both_states_are_judged_at_every_stage(tiny, tmp_path):
    states = tmp_path / "states.json"
    runner.write(states, {"2": {"published": [3, 1]}, "3": {"isingcut": [5, 1, 2]}})
    words = [*tiny, f"--work={tmp_path}/work", "--remove=2", f"--states={states}"]
    words += ["--methods", "isingcut", "published", "before-last"]
    words += ["--tasks=arc_easy", "--questions=6", "--patch-tokens=960"]
    words += ["--batch=2", "--samples=40", "--steps=1"]
    runner.run(Published, words)
    results = tmp_path / "published.json"
    runner.run(Published, [*words, "--collect", "--results", str(results)])
    rows = runner.read(results)["removals"]["2"]
    chosen = open_run(tmp_path / "work/run-2").chosen
    assert rows["isingcut"]["removed"] == list(chosen.removed)
    assert rows["published"]["removed"] == [1, 3]
    assert rows["before-last"]["removed"] == [3, 4]
    figures = Published.show(runner.read(results))
    for stage in ("cut", "least_squares", "patched", "healed"):
        assert figures[f"published_kl_over_ours_{stage}"] > 0
        assert f"published_points_minus_ours_{stage}_95" in figures
    # A state of ours in the file takes the place of a run.
    given = Published(runner.parse(Published, words)).choosing("isingcut", 3)
    assert given.make(tmp_path) == {"removed": [1, 2, 5]}


def test_figures_are_the_published_state_against_ours():
    def method(kl, right):
        sample = {"kl": kl, "nll": [0.0, 0.0], "counts": [1, 1]}
        answers = {"accuracy": {"piqa": {"right": right}}}
        cut = judged_stage({"c4": sample}, {"c4": sample}) | answers
        return {"removed": [1], "stages": {"cut": cut}}

    ours = method([1.0, 3.0], "1100")
    published = method([3.0, 5.0], "1011")
    removals = {"4": {"isingcut": ours, "published": published}}
    content = {"settings": {"prefix": ""}, "states_from": "", "removals": removals}
    # Above twice ours by 1 and -1.
    error = math.sqrt(2 * 2) / 2 / 2
    half = 196 * math.sqrt(11 / 12 / 4)
    assert Published.show(content) == {
        "published_kl_over_ours_cut": pytest.approx(2.0),
        "published_kl_over_ours_cut_se": pytest.approx(error),
        "published_points_minus_ours_cut": pytest.approx(25.0),
        "published_points_minus_ours_cut_95": pytest.approx(half),
    }
