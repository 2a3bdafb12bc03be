"""Tests of the study of objectives on a tiny model, and of its correlations on made-up results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isingcut.errors import InputError
from studies import runner
from studies.objectives import study, summary
from studies.objectives.study import Objectives
from studies.runner import Content
from studies.runner_models import Bits


# The rank correlation of six states with equal answers is undefined.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_tiny_study_runs_to_its_figures(
    tiny: list[str], healed: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *healed, "--remove", "2", "--states", "6", "--repaired", "3"]
    words += ["--tasks", "arc_easy", "piqa", "--work", str(tmp_path / "work")]
    runner.run(Objectives, words)
    names = [p.parent.name for p in (tmp_path / "work/parts").rglob("*.json")]
    assert names.count("patched") == names.count("healed") == 3
    runner.run(Objectives, [*words, "--collect", "--results", str(tmp_path / "o.json")])
    content = runner.read(tmp_path / "o.json")
    assert [len(content["losses"][text]["kl"]) for text in Objectives.judged] == [6] * 8
    assert [len(row["healed"]["right"]["piqa"]) for row in content["repaired"]] == [6] * 3


def test_states_are_those_of_the_committed_results() -> None:
    found = study.chosen_states(44, 30)
    assert found == runner.read(runner.STUDIES / "objectives/results/objectives.json")["states"]


def test_any_number_of_blocks_has_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objectives, "replay", range(30))
    words = ["--work", str(tmp_path), "--remove", "9"]
    states = Objectives(runner.parse(Objectives, words)).states
    assert [len(set(s)) for s in states] == [9] * 44


def test_states_of_other_models_are_runs_and_exchanges_in_the_middle() -> None:
    found = study.windows(7, 16, 28)
    runs = [s for s in found if s[-1] - s[0] == 6]
    assert len({tuple(s) for s in found}) == 16
    assert all(len(set(s)) == 7 and set(s) <= set(range(1, 27)) for s in found)
    assert (runs[0][0], runs[-1][-1]) == (4, 23)
    assert 0 < len(found) - len(runs) < 4
    assert study.windows(7, 3, 28) == found[:3]


@pytest.mark.parametrize("m", [1, 2])
def test_more_states_than_exist_are_refused(m: int) -> None:
    with pytest.raises(InputError, match="lower --states"):
        study.windows(m, 99, 8)


def test_repaired_states_are_spread_over_the_order() -> None:
    values = [5.0, 1.0, 4.0, 0.0, 3.0, 2.0]
    assert study.spread(values, 3) == [3, 5, 0]
    assert sorted(study.spread(values, 9)) == list(range(6))


def answers(states: int, questions: int) -> tuple[Bits, Bits]:
    """Return a quality (S,) of each state, and right answers (S, Q) with that probability."""
    draw = np.random.default_rng(1)
    quality = np.linspace(0.1, 0.9, states)
    return quality, (draw.random((states, questions)) < quality[:, None]).astype(int)


def test_correlations_tell_a_loss_that_orders_from_one_that_does_not() -> None:
    quality, right = answers(30, 200)
    noise = np.random.default_rng(2).random(30)
    losses = {"good": -quality, "bad": noise, "worst": quality}
    found = summary.correlations([right], losses, "bad", 200)
    good, bad, worst = found.values()
    assert good.rho > 0.95
    assert worst.rho == pytest.approx(-good.rho)
    assert abs(bad.rho) < 0.5
    assert all(c.low < c.high and c.low <= c.rho <= c.high for c in (good, bad, worst))
    assert bad.high - bad.low > good.high - good.low
    assert (bad.more, bad.more_low, bad.more_high) == (0, 0, 0)
    assert good.more == pytest.approx(good.rho - bad.rho)
    assert good.more_low > 0 > worst.more_high


def test_the_lower_half_is_that_of_the_lowest_mean() -> None:
    losses = {"a": {"kl": [4.0, 1.0, 2.0, 3.0]}, "b": {"kl": [0.0, 1.0, 9.0, 0.0]}}
    assert summary.lower_half(losses).tolist() == [1, 3]


def test_the_repaired_are_ordered_by_losses_of_the_cut_and_of_themselves() -> None:
    quality, right = answers(12, 200)
    text = ["".join(map(str, row)) for row in right]
    found: Content = {"states": [[i] for i in range(12)], "right": {"piqa": text}}
    at = [9, 2, 5, 0, 7, 1, 11, 3, 10, 4, 8, 6]
    found["repaired"] = [
        {
            "state": [i],
            "healed": {"right": {"piqa": text[i]}, "losses": {"web": {"kl": quality[i]}}},
        }
        for i in at
    ]
    repaired, by = summary.repaired(found, {"web": -quality}, "healed")
    assert repaired["piqa"].tolist() == right[at].tolist()
    assert by["web"].tolist() == (-quality[at]).tolist()
    rows = summary.correlations(list(repaired.values()), by, "web", 100)
    assert rows["web"].rho > 0.9 > -0.9 > rows["own_web"].rho
    assert rows["cut_accuracy"].rho == pytest.approx(1)


def test_reliability_grows_with_the_questions() -> None:
    few, many = (summary.reliability([answers(30, q)[1]], 50) for q in (10, 200))
    assert 0.3 < few < many < 1
    coins = (np.random.default_rng(3).random((30, 100)) < 0.5).astype(int)
    assert abs(summary.reliability([coins], 50)) < 0.5


def test_certainties_order_better_than_scores_where_they_say_more() -> None:
    quality, right = answers(30, 60)
    draw = np.random.default_rng(5)
    certain = quality[:, None] + 0.1 * draw.normal(size=right.shape)
    scores, certainties = (summary.half_spearman([o], [right], 50) for o in (right, certain))
    assert scores < certainties < 1
    # The scale of a task's values does not matter.
    scaled = [summary.in_spreads(k * certain) for k in (1.0, 50.0)]
    assert np.allclose(*scaled)


def test_the_default_is_the_mixture_of_the_highest_correlation() -> None:
    quality, right = answers(20, 100)
    noise = np.random.default_rng(4).random(20)
    texts = {"web": 1 - quality, "stories": 1 - quality, "wiki": noise, "python": noise}
    said = Objectives.show(
        {
            "settings": {"model": "m", "remove": 6},
            "states": [[0]] * 20,
            "losses": {t: {"kl": list(v), "nll": list(noise)} for t, v in texts.items()},
            "original": {"piqa": "1" * 100},
            "right": {"piqa": ["".join(map(str, row)) for row in right]},
        }
    )
    assert said["objective_spearman_web"] > 0.9
    assert said["objective_spearman_web"] > said["objective_spearman_wiki_python"]
    assert "objective_spearman_web_qa" not in said
    assert said["default_objective"] == "web_stories"
