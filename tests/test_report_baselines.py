"""The report's table of other methods, from the files that the verb `baseline` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isingcut.files.writing import read_json, write_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report.baselines import rival_row, rivals
from isingcut.report.run_files import RunFiles
from isingcut.report.states import book
from run_files import write_report
from small_run import section, write_small_run

CHOSEN = {"removed": [1, 5], "kl": 0.5, "kl_se": 0.0625, "nll": 3.0, "nll_se": None}
N = 12


def files_of(*found: dict[str, Any], ranked: bool = True, **meta: Any) -> RunFiles:
    """A run of 12 blocks, and these methods."""
    return RunFiles(
        Path(),
        Path(),
        {"config": {"energy": "pairwise"}, "blocks": {"blocks": [{}] * N}},
        candidates={"candidates": [CHOSEN], "random": [], "chosen": CHOSEN} if ranked else None,
        hamiltonian=Hamiltonian(np.zeros(N), np.zeros((N, N)), meta=meta),
        baselines=list(found),
    )


def rows_of(files: RunFiles) -> list[tuple[str, ...]]:
    return [rival_row(rival) for rival in rivals(files, book(files))]


def baseline(name: str, kl: float, **more: Any) -> dict[str, Any]:
    return {
        "baseline": name,
        "removed": [2, 3],
        "kl": kl,
        "kl_se": 0.25,
        "nll": 3.5,
        "nll_se": 0.125,
        "passes": 12.3456,
        "tokens_searched": 4080,
        "merges": [],
        "violated": [],
        "info": {},
        **more,
    }


def test_rows_are_sorted_with_the_chosen_state_among_them():
    found = [baseline("sleb", 0.75, settings=["loss=kl"]), baseline("random", 0.25)]
    assert rows_of(files_of(*found, tokens=99, blocks_run=36)) == [
        ("`random`", "2 and 3", "0.2500 ± 0.2500", "3.5000 ± 0.1250", "12.3", "4080", "none"),
        ("chosen (`pairwise`)", "1 and 5", "0.5000 ± 0.0625", "3.0000", "3", "99", "none"),
        (
            "`sleb`, loss=kl",
            "2 and 3",
            "0.7500 ± 0.2500",
            "3.5000 ± 0.1250",
            "12.3",
            "4080",
            "none",
        ),
    ]


def test_merges_broken_constraints_and_unknown_prices_are_said():
    merged = baseline("m", 0.25, merges=[[1, 2], [0, 3]], violated=["keep 0", "keep 2"])
    rows = rows_of(files_of(merged))
    assert rows[0][1] == "2 and 3, merged into 1 and 0"
    assert rows[0][-1] == "keep 0, keep 2"
    assert rows[1][4:6] == ("not counted", "unknown")
    counted = rows_of(files_of(merged, passes=80.0, tokens=9))
    assert counted[1][4:6] == ("80", "9")
    assert rows_of(files_of(merged, ranked=False)) == rows[:1]
    assert rows_of(files_of()) == []


def test_only_methods_that_keep_the_constraints_can_win():
    lower = [baseline("a", 0.25), baseline("b", 0.25, violated=["keep 0"]), baseline("c", 0.75)]
    assert files_of(*lower).won == ["a"]
    assert files_of(*lower, ranked=False).won == []


def test_the_report_shows_them(tmp_path: Path):
    run = write_small_run(tmp_path / "r")
    for name, kl in (("sleb", 0.5), ("cbo", 0.125)):
        write_json(run / f"baseline-{name}.json", "baseline", baseline(name, kl))
    write_report(run)
    part = section((run / "report.md").read_text(encoding="utf-8"), "Other methods")
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| `cbo` | 2 and 3 | 0.1250 ± 0.2500 | 3.5000 ± 0.1250 | 12.3 |")
    assert rows[2].startswith("| chosen (`pairwise`) | 10 and 11 | 0.2750 ± 0.0625 |")
    assert "**Warning.** Measured here, cbo found a lower KL" in part
    data = read_json(run / "report.json", "report")
    assert data["baselines"] == [baseline("cbo", 0.125), baseline("sleb", 0.5)]
