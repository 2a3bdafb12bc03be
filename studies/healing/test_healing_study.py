"""Tests of the healing study on a tiny model, and of its figures from a hand-made results file."""

import copy
import math

import pytest

from studies import runner
from studies.healing.study import Healing, judged_stage
from studies.healing.summary import PEERS, STAGES, paired


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory):
    work = tmp_path_factory.mktemp("healing")
    words = [*tiny, "--remove=2", "--state-tokens=96", "--tuned=isingcut"]
    words += ["--batch=2", "--patch-tokens=960", "--questions=6"]
    words += ["--samples=40", "--steps=1,2", f"--work={work}/work"]
    words += ["--methods", "isingcut", *PEERS, "last", "--tasks=arc_easy"]
    runner.run(Healing, words)
    # A second recipe with the same text and work folder.
    runner.run(Healing, [*words, "--method=lora", "--rate=0.002", "--steps=1"])
    runner.run(Healing, [*words, "--collect", "--results", str(work / "healing.json")])
    return runner.read(work / "healing.json")


def test_every_stage_is_judged(content, capsys):
    rows = content["removals"]["2"]
    ours = rows["isingcut"]
    assert rows["last"]["removed"] == [4, 5]
    trainings = {"healed 8.4e-05M", "healed 0.00017M", "healed 8.4e-05M lora-0.002"}
    assert set(ours["stages"]) == {*STAGES, *trainings}
    assert all({"cut", "patched", *trainings} <= set(rows[p]["stages"]) for p in PEERS)
    short, long = (ours["stages"][f"healed {n}M"] for n in (8.4e-05, 0.00017))
    assert [short["tokens_seen"], long["tokens_seen"]] == [84, 167]
    # The longer training begins with the same samples.
    assert long["training"][0] == short["training"][0]
    assert set(ours["stages"]["cut"]["texts"]) == set(Healing.judged)
    rows = [ours["stages"][name] for name in ("cut", "patched", *trainings)]
    rows.append(content["original"])
    assert all(len(row["accuracy"]["arc_easy"]["right"]) == 6 for row in rows)
    figures = Healing.show(content)
    assert "; isingcut minus it " in capsys.readouterr().out
    assert {
        "recovered_percent_2_at_0.00017M",
        "recovered_percent_2_at_8.4e-05M_lora-0.002",
        "healed_ppl_over_best_peer_2_8.4e-05M_se",
        "kl_over_best_peer_2",
    } <= set(figures)


def stage(nll):
    sample = {"kl": [nll - 3.0, nll - 3.0], "nll": [2 * nll, 0.0], "counts": [1, 1]}
    return judged_stage({"c4": sample}, {"c4": {**sample, "nll": [6.0, 0.0]}})


def method(cut, tuned, healed):
    training = {**stage(healed), "tokens_seen": 99, "stopped": None}
    stages = {"cut": stage(cut), "tuned": stage(tuned), "healed 9M": training}
    return {"removed": [1, 2], "stages": stages}


def figures(prefix="", **rows):
    settings = {"settings": {"prefix": prefix}, "states_from": "a test"}
    return Healing.show({**settings, "removals": {"9": rows}})


OTHERS = {
    "block-influence": method(4.5, 4.2, 3.9),
    "angular-window": method(4.2, 4.1, 3.6),
    "sleb": method(4.1, 4.05, 3.7),
}


def test_two_lengths_of_as_many_tokens_are_both_kept(tmp_path):
    found = Healing(runner.parse(Healing, [f"--work={tmp_path}"]))
    for steps in (10, 11):
        runner.write(
            found.path(f"healed/full-0.0003-{steps}/1-2"),
            {"tokens_seen": 20000 * steps},
        )
    assert [*found.trainings([1, 2])] == ["0.22M", "0.2M"]
    runner.write(found.path("healed/full-0.0003-12/1-2"), {"tokens_seen": 221000})
    assert [*found.trainings([1, 2])] == ["0.22M", "0.22M 12 steps", "0.2M"]


def test_figures():
    found = figures(isingcut=method(4.0, 3.75, 3.4), **OTHERS)
    ratio = math.exp(3.4 - 3.6)
    assert {k: v for k, v in found.items() if not k.endswith("_se")} == {
        "recovered_percent_9_at_9M": pytest.approx(60.0),
        "patch_percent_9": pytest.approx(25.0),
        # The best peer after healing is angular-window; before it, sleb.
        "healed_ppl_over_best_peer_9_9M": pytest.approx(ratio),
        "cut_ppl_over_best_peer_9": pytest.approx(math.exp(4.0 - 4.1)),
        "kl_over_best_peer_9": pytest.approx(1.0 / 1.1),
    }
    # The gaps on two samples of one token are -0.4 and 0, so that residuals are -0.2 and 0.2.
    error = math.sqrt(2 * 0.2**2 * 2) / 2
    assert found["healed_ppl_over_best_peer_9_9M_se"] == pytest.approx(ratio * error)
    found = figures("deep_", isingcut=method(4.0, 3.75, 3.4), **OTHERS)
    assert all(name.startswith("deep_") for name in found)


def test_no_figure_is_made_up_for_what_was_not_measured():
    ours = method(4.0, 3.75, 3.4)
    for row in (others := copy.deepcopy(OTHERS)).values():
        del row["stages"]["healed 9M"]
    found = figures(isingcut=ours, **others)
    assert "recovered_percent_9_at_9M" in found
    assert not any(name.startswith("healed_ppl") for name in found)
    del ours["stages"]["healed 9M"]
    assert not any("9M" in name for name in figures(isingcut=ours, **OTHERS))
    assert not figures(**OTHERS)


def test_differences_are_paired():
    first = {"c4": {"sample_nll": [10.0, 22.0], "sample_tokens": [4, 8]}}
    second = {"c4": {"sample_nll": [11.0, 24.0], "sample_tokens": [4, 8]}}
    # 0.25 nats per token more on each sample: no spread.
    assert paired(first, second, "nll") == (pytest.approx(0.25), pytest.approx(0.0), 2)
    second["c4"]["sample_nll"][1] = 22.0
    gap, error, _ = paired(first, second, "nll")
    # Residuals of the gaps 1 and 0 around 1/12 per token: 2/3 and -2/3.
    assert gap == pytest.approx(1 / 12)
    assert error == pytest.approx(math.sqrt(2 * (2 / 3) ** 2 * 2) / 12)


def test_accuracies_are_compared_by_question(capsys):
    ours = method(4.0, 3.75, 3.4)
    peer = copy.deepcopy(OTHERS["sleb"])
    tasks = ("piqa", "arc_easy")
    for stage, bits in (("cut", "1100"), ("tuned", "1011")):
        right = {task: {"right": bits} for task in tasks}
        ours["stages"][stage]["accuracy"] = {**right, "gsm8k": {"right": "01"}}
        peer["stages"][stage]["accuracy"] = {task: {"right": "1100"} for task in tasks}
    figures(isingcut=ours, sleb=peer)
    lines = capsys.readouterr().out.splitlines()
    # Gaps of 0, -1, 1, 1: variance 11/12, two tasks alike. GSM8K is not in the mean.
    gap = f"+25.0 ± {196 * (2 * 11 / 12 / 4) ** 0.5 / 2:.1f}"
    for name, words in (
        ("isingcut", f"; piqa 75.0, arc_easy 75.0, gsm8k 50.0; mean 75.0, {gap}"),
        ("sleb", f"mean 50.0, +0.0 ± 0.0; isingcut minus it {gap}"),
    ):
        (tuned,) = (x for x in lines if x.startswith(name) and " tuned " in x)
        assert tuned.endswith(words)
