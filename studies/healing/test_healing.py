"""The healing study on a tiny model, and its figures from a results file made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from studies import runner
from studies.healing.study import Healing, judged_stage
from studies.healing.summary import STAGES, paired
from studies.runner import Content

PEERS = ("block-influence", "angular-window", "sleb")


@pytest.fixture(scope="module")
def content(
    tiny: list[str], healed: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Content:
    work = tmp_path_factory.mktemp("healing")
    words = [*tiny, *healed, "--remove", "2", "--state-tokens", "96", "--top-steps", "1"]
    words += ["--work", str(work / "work")]
    runner.run(Healing, words)
    runner.run(Healing, [*words, "--collect", "--results", str(work / "healing.json")])
    return runner.read(work / "healing.json")


def test_every_stage_is_judged_and_the_best_candidate_healed(content: Content) -> None:
    rows = content["removals"]["2"]
    ours = rows["isingcut"]
    assert tuple(ours["stages"]) == STAGES
    assert all({"cut", "patched", "healed"} <= set(rows[p]["stages"]) for p in PEERS)
    tried = {p: r["trial"]["kl"] for p, r in rows.items() if r["trial"]}
    assert tried[ours["healed_state_of"]] == min(tried.values())
    assert ours["tokens_seen"] == 2 * 2 * 23
    assert set(ours["stages"]["cut"]["texts"]) == set(Healing.judged)
    figures = Healing.show(content)
    assert {"recovered_percent_2", "healed_ppl_over_best_peer_2"} <= set(figures)


def stage(nll: float) -> Content:
    sample = {"kl": [nll - 3.0, nll - 3.0], "nll": [2 * nll, 0.0], "counts": [1, 1]}
    original = {**sample, "nll": [6.0, 0.0]}
    return judged_stage({"c4": sample}, {"c4": original})


def method(cut: float, tuned: float, healed: float) -> Content:
    stages = {"cut": stage(cut), "tuned": stage(tuned), "healed": stage(healed)}
    rest = {"tokens_seen": 99, "trial": None, "healed_state_of": "isingcut"}
    return {"removed": [1, 2], "stages": stages, **rest}


def figures(model: str = "m", **rows: Any) -> dict[str, float]:
    settings = {"settings": {"model": model}, "states_from": "a test"}
    return Healing.show({**settings, "removals": {"9": rows}})


OTHERS = {
    "block-influence": method(4.5, 4.2, 3.9),
    "angular-window": method(4.2, 4.1, 3.6),
    "sleb": method(4.1, 4.05, 3.7),
}


def test_figures() -> None:
    found = figures(isingcut=method(4.0, 3.75, 3.4), **OTHERS)
    assert found == {
        "recovered_percent_9": pytest.approx(60.0),
        "patch_percent_9": pytest.approx(25.0),
        # The best peer after healing is angular-window; before it, sleb.
        "healed_ppl_over_best_peer_9": pytest.approx(math.exp(3.4 - 3.6)),
        "cut_ppl_over_best_peer_9": pytest.approx(math.exp(4.0 - 4.1)),
    }
    found = figures("coder", isingcut=method(4.0, 3.75, 3.4), **OTHERS)
    assert all(name.startswith("coder_") for name in found)


def test_no_figure_is_made_up_for_what_was_not_measured() -> None:
    ours = method(4.0, 3.75, 3.4)
    two = {k: v for k, v in OTHERS.items() if k != "sleb"}
    assert set(figures(isingcut=ours, **two)) == {"patch_percent_9", "recovered_percent_9"}
    del ours["stages"]["healed"]
    assert set(figures(isingcut=ours, **OTHERS)) == {"patch_percent_9"}


def test_differences_are_paired() -> None:
    first = {"c4": {"sample_nll": [10.0, 22.0], "sample_tokens": [4, 8]}}
    second = {"c4": {"sample_nll": [11.0, 24.0], "sample_tokens": [4, 8]}}
    # 0.25 nats a token more on each sample: no spread.
    assert paired(first, second, "nll") == (pytest.approx(0.25), pytest.approx(0.0), 2)
    second["c4"]["sample_nll"][1] = 22.0
    gap, error, _ = paired(first, second, "nll")
    # Residuals of gaps 1, 0 around 1/12 a token: 2/3 and -2/3.
    assert gap == pytest.approx(1 / 12)
    assert error == pytest.approx(math.sqrt(2 * (2 / 3) ** 2 * 2) / 12)


def test_committed_results_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    runner.run(Healing, ["--summary"])
    shown = capsys.readouterr().out
    assert "tuned_percent_6: 43.68" in shown
    assert "coder_recovered_percent_7: " in shown
