"""Tests of the accuracy study on a tiny model, and of its figures from hand-made results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from studies import runner
from studies.accuracy import summary
from studies.accuracy.study import Accuracy
from studies.runner import Content
from studies.runner_models import difference


@pytest.fixture(scope="module")
def content(
    tiny: list[str], healed: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Content:
    work = tmp_path_factory.mktemp("accuracy")
    words = [*tiny, *healed, "--remove", "2", "--state-tokens", "96", "--conversations", "96"]
    words += ["--tasks", "arc_easy", "piqa", "--repaired-peers", "1", "--work", str(work / "work")]
    runner.run(Accuracy, words)
    runner.run(Accuracy, [*words, "--collect", "--results", str(work / "accuracy.json")])
    return runner.read(work / "accuracy.json")


def test_every_method_removes_as_many_blocks_as_it_should(content: Content) -> None:
    rows = content["removals"]["2"]
    assert {"last", "cbo", "cbo-top20", "evopress", "isingcut"} <= set(rows)
    for name, row in rows.items():
        assert len(set(row["removed"])) == 2, name
        assert set(row["stages"]["cut"]["accuracy"]) == {"arc_easy", "piqa"}
        assert set(row["stages"]["cut"]["losses"]) == set(Accuracy.judged)
    assert rows["last"]["removed"] == [4, 5]
    # Ours and one peer are repaired.
    assert sum("healed" in row["stages"] for row in rows.values()) == 2
    assert set(rows["isingcut"]["stages"]) == {"cut", "tuned", "healed"}
    assert "healed_accuracy_minus_best_peer_2" in Accuracy.show(content)


def test_ours_need_not_be_given(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--methods", "last", "sleb", "--repaired-peers", "1"]
    study = Accuracy(runner.parse(Accuracy, words))
    for i, method in enumerate(("last", "sleb")):
        choices = {method: [{"remove": 4, "removed": [i]}]}
        runner.write(study.path(f"states/{method}"), {"choices": choices})
    rows = {str(i): {"kl": [2.0 - i], "counts": [1]} for i in range(2)}
    for text in study.judged:
        runner.write(study.path(f"losses/{text}/all"), {"rows": rows})
    assert study.repaired(4) == ["sleb"]


def stages(**right: str) -> Content:
    return {
        "removed": [1, 2],
        "stages": {
            stage: {"accuracy": {"piqa": {"right": bits}}, "losses": {}}
            for stage, bits in right.items()
        },
    }


def test_figures_are_paired_differences_in_points() -> None:
    rows = {
        "isingcut": stages(cut="11110000", healed="11111100"),
        "sleb": stages(cut="11000000", healed="11111110"),
        "block-influence": stages(cut="11110000", healed="11000000"),
    }
    original = {"accuracy": {"piqa": {"right": "11111111"}}}
    content = {"settings": {}, "tasks": ["piqa"], "original": original, "removals": {"4": rows}}
    said = Accuracy.show(content)
    error = 100 * np.std([0, 0, 1, 1, 0, 0, 0, 0], ddof=1) / np.sqrt(8)
    assert said["accuracy_minus_sleb_4"] == 25.0
    assert said["accuracy_minus_sleb_4_se"] == pytest.approx(error)
    assert said["accuracy_minus_block_influence_4"] == 0.0
    assert said["healed_accuracy_minus_best_peer_4"] == -12.5
    assert "accuracy_minus_window_4" not in said


def test_a_mean_is_over_the_tasks_that_every_model_of_the_stage_was_asked() -> None:
    rows = {"isingcut": stages(cut="1100", healed="1110"), "sleb": stages(cut="1000")}
    rows["isingcut"]["stages"]["cut"]["accuracy"]["boolq"] = {"right": "0000"}
    shared = summary.shared_tasks(rows, ["piqa", "boolq"])
    assert shared == {"cut": ["piqa"], "healed": ["piqa"]}
    assert summary.figures_of("4", rows, shared)["accuracy_minus_sleb_4"] == 25.0


def test_the_difference_of_the_mean_is_paired() -> None:
    one, two = ({t: {"right": r} for t in ("a", "b")} for r in ("1100", "1011"))
    gap, error = difference(one, two, ["a", "b"])
    assert gap == pytest.approx(0.25)
    # Gaps by question 0, -1, 1, 1: variance 11/12, two tasks alike.
    assert error == pytest.approx(np.sqrt(2 * (11 / 12) / 4) / 2)
