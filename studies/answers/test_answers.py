"""Tests of the study of own answers on a tiny model, and of its figures from hand-made results."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import runner
from studies.answers.study import Answers, is_right


def test_every_stage_answers_every_problem(
    tiny: list[str], healed: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *healed, "--blocks", "2,3", "--problems", "5", "--samples", "40"]
    words += ["--work", str(tmp_path / "work")]
    runner.run(Answers, words)
    runner.run(Answers, [*words, "--collect", "--results", str(tmp_path / "answers.json")])
    content = runner.read(tmp_path / "answers.json")
    assert [*content["stages"]] == ["original", "cut", "wiki", "own"]
    for row in content["stages"].values():
        assert len(row["right"]) == len(row["ended"]) == 5
        assert set(row["kl"]) == set(Answers.judged)
    assert content["stages"]["original"]["kl"]["c4"] == pytest.approx(0, abs=1e-5)
    losses = [content["stages"][stage]["kl"]["c4"] for stage in ("cut", "wiki", "own")]
    assert len({*losses}) == 3
    assert min(losses) > 0
    # One text is packed, the other is not: they cannot be the same.
    seen = [content["stages"][stage]["tokens_seen"] for stage in ("wiki", "own")]
    assert seen[0] != seen[1]


def test_the_last_number_counts() -> None:
    assert is_right("First 3, so $1,080.00.", "1080")
    assert is_right("It falls by 5 to -2.", "-2")
    assert not is_right("18 eggs, then 17", "18")
    assert not is_right("I do not know.", "18")


def test_figures_are_paired() -> None:
    kl = {"kl": {"c4": 0.5}}
    stages = {
        "wiki": {"right": "1000", "ended": "1100", **kl},
        "own": {"right": "1110", "ended": "1111", **kl},
    }
    found = Answers.show({"settings": {"blocks": [1, 2], "prefix": "x_"}, "stages": stages})
    assert (found["x_gsm8k_2_wiki"], found["x_gsm8k_2_own"], found["x_gsm8k_2_n"]) == (1, 3, 4)
    assert found["x_ended_2_own"] == 4
    assert found["x_own_gain_percent_2"] == 50
    # Gaps 0, 1, 1, 0: variance 1/3.
    assert found["x_own_gain_percent_2_se"] == pytest.approx(100 * (1 / 12) ** 0.5)
