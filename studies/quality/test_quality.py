"""Tests of the quality study on a tiny model, against direct computations."""

import numpy as np
import pytest

from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from studies import runner
from studies.quality import tables
from studies.quality.study import Quality

SIZES = ["--pool=3", "--search-pool=4", "--remove=2,3", "--second-remove=2"]


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory):
    """Return the results file of a whole run."""
    work = tmp_path_factory.mktemp("quality")
    words = [*tiny, *SIZES, "--seeds=2", f"--work={work}/work"]
    runner.run(Quality, words)
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*.json")}
    runner.run(Quality, words)
    assert {p: p.stat().st_mtime_ns for p in work.rglob("*.json")} == before
    runner.run(Quality, [*words, "--collect", "--results", str(work / "quality.json")])
    return runner.read(work / "quality.json")


def test_losses_of_the_tables_are_those_of_the_states(content, tiny, tmp_path):
    first = content["tables"][0]
    assert (first["chosen_on"], first["remove"]) == ("wiki", 2)
    entries = {e["method"]: e for e in first["methods"]}
    assert {
        "sleb",
        "pairwise",
        "pairwise-top20",
        "evopress",
        "refined",
        "random",
    } <= set(entries)
    study = Quality(runner.parse(Quality, [*tiny, f"--work={tmp_path}"]))
    for name in ("wikitext2", "instruct"):
        removed = [e["removed"] for e in entries.values()]
        found = measure(study.replay, study.judged_text(name), states_of(6, removed))
        for metric, expected in (("kl", found.kl), ("nll", found.nll)):
            rows = first["losses"][name][metric]["methods"]
            got = [rows[m]["value"] for m in entries]
            np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_an_evolution_pays_no_more_than_sleb(content):
    assert {t["chosen_on"] for t in content["tables"]} == {"wiki", "instruct"}
    for table in content["tables"]:
        entries = {e["method"]: e for e in table["methods"]}
        assert len(entries["evopress"]["runs"]) == 2
        assert all(
            r["passes"] <= entries["sleb"]["passes"]
            for r in entries["evopress"]["runs"]
        )


def test_figures_follow_from_the_tables(content):
    figures = Quality.show(content)
    kl = content["tables"][0]["losses"]["pooled"]["kl"]["methods"]
    others = [
        v["value"] for m, v in kl.items() if m not in ("refined", "refined-joint")
    ]
    ratio = kl["refined"]["value"] / min(others)
    assert figures["refined_kl_over_best_baseline_2"] == pytest.approx(ratio, rel=1e-3)
    assert 0 <= figures["refined_lowest_or_within"] <= 1
    over = []
    for table in content["tables"][:2]:
        entries = {e["method"]: e for e in table["methods"]}
        runs = entries["refined"]["runs"]
        sleb = entries["sleb"]
        over += [
            max(r[unit] for r in runs) / sleb[unit] for unit in ("passes", "heads")
        ]
    assert figures["refined_price_over_sleb"] == pytest.approx(max(over), rel=1e-3)


def test_intervals_are_paired():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 10.0, 40)
    sums = {"a": base, "b": base + 0.2, "c": base + rng.normal(9, 4, 40)}
    rows = {k: {"kl": v.tolist(), "counts": [10] * 40} for k, v in sums.items()}
    found = tables.compare(
        {"x": rows}, {"refined": "b", "sleb": "a", "evopress": "c"}, "kl"
    )
    ours = found["refined"]
    # Both sides use the same samples, so that the interval excludes their spread.
    assert ours["difference"] == pytest.approx(0.02, rel=1e-4)
    assert ours["best_other"] == "sleb"
    assert ours["difference_interval"] == pytest.approx([0.02, 0.02], rel=1e-3)
    assert not ours["within_interval"]
    se = found["methods"]["sleb"]["se"]
    assert se == pytest.approx(base.std(ddof=1) / 40**0.5 / 10, rel=1e-3)


def test_the_median_run_stands_for_a_method():
    runs = [{"kl": kl, "seed": seed} for seed, kl in enumerate((3.0, 1.0, 2.0))]
    assert tables.median_run(runs)["seed"] == 2
