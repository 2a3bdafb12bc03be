"""Tests of the choice study: its rules and figures, and a run on a tiny model."""

import pytest

from studies import runner
from studies.choice.study import Choice, _rules


def candidate(kl, patched):
    unseen = {"c4": {"cut": [4 * kl], "patched": [2 * patched], "counts": [2]}}
    shared = {"removed": [1], "above_lowest_se": 0.01, "unseen": unseen}
    return {**shared, "kl": kl, "patched_kl": patched}


NEAR = [candidate(1.0, 0.8), candidate(1.015, 0.7), candidate(1.04, 0.6)]


def test_rules():
    rules = {"tie_regret": 1, "near_gain": 2, "patched_choice_gain": 2}
    assert _rules(NEAR) == rules
    assert _rules([*NEAR[:2], candidate(1.06, 0.6)]) == {**rules, "near_gain": 1}


def test_figures():
    rows = [
        {"text": str(k), "ended": {"kl": kl, "passes": 1.0}}
        for k, kl in ((0, 1.0), (1, 1.03))
    ]
    longer = {"kl": 1.0, "passes": 2.0}
    settings = {
        "settings": {"remove": 6, "prefix": ""},
        "provenance": {"model": "tiny"},
    }
    near = [NEAR, NEAR[:1]]
    texts = [
        row | {"longer": longer, "near": n} for row, n in zip(rows, near, strict=True)
    ]
    found = Choice.show({**settings, "texts": texts})
    assert found["stop_rule_regret_percent"] == pytest.approx(1.5)
    assert found["stop_rule_regret_percent_worst"] == pytest.approx(3.0)
    # First text: 0.6 instead of 0.8 patched, 1.04 instead of 1.0 cut. Second text: no change.
    assert found["patched_choice_gain_percent_patched"] == pytest.approx(12.5)
    assert found["patched_choice_gain_percent_patched_se"] == pytest.approx(12.5)
    assert found["near_gain_percent_cut"] == pytest.approx(-2.0)


def test_a_run_is_judged(tiny, tmp_path):
    words = [
        *tiny,
        "--remove=2",
        "--patch-tokens=1920",
        "--work",
        str(tmp_path / "work"),
    ]
    words += ["--texts", "default", "four kinds"]
    runner.run(Choice, words)
    runner.run(Choice, [*words, "--collect", "--results", str(tmp_path / "found.json")])
    for row in runner.read(tmp_path / "found.json")["texts"]:
        assert row["longer"]["kl"] <= row["ended"]["kl"] * (1 + 1e-6)
        kl = [state["kl"] for state in row["near"]]
        assert kl == sorted(kl)
        assert len(row["near"]) == 3
        for state in row["near"]:
            assert state["patched_kl"] > 0
            judged = state["unseen"]["wikitext2"]
            assert sum(judged["patched"]) != pytest.approx(sum(judged["cut"]), rel=1e-6)
