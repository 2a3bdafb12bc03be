"""Tests of the study of narrow texts: its texts and figures, and a run on a tiny model."""

import json

import pytest

from studies import runner
from studies.narrow.study import Narrow
from studies.narrow.texts import DOCUMENTS, NAMES, write_text


def row(text, share, patched):
    sums = {"counts": [10, 10, 10], "cut": [4.0, 5.0, 6.0], "patched": patched}
    own = {**sums, "patched": [1.0, 2.0, 3.0]}
    return {
        "text": text,
        "share": share,
        "fitted": {"tokens": 8},
        "own": own,
        "unlike": sums,
    }


def test_texts_are_distinct_documents_and_the_same_each_time(tmp_path):
    for name in NAMES:
        first = write_text(name, tmp_path).read_bytes()
        assert write_text(name, tmp_path).read_bytes() == first
        assert (
            len({json.loads(line)["text"] for line in first.splitlines()}) == DOCUMENTS
        )


def test_a_harm_is_more_than_two_paired_errors():
    rows = [row("laws", 0.0, [5.0, 6.0, 7.1]), row("German", 0.0, [3.0, 5.5, 7.5])]
    found = Narrow.show({"rows": [*rows, row("laws", 0.5, [3.0, 4.0, 5.0])]})
    assert (
        found["patch_harms_unlike_text_0"],
        found["patch_harms_unlike_text_50"],
    ) == (1, 0)
    assert found["unlike_kl_change_50"] == pytest.approx(-0.1)
    assert found["own_kl_change_0"] == pytest.approx(-0.3)


def test_a_patch_is_judged(tiny, tmp_path):
    words = [*tiny, "--removed=2,3", "--patch-tokens=960", "--shares=0"]
    words += [f"--work={tmp_path}/work", "--only=laws"]
    runner.run(Narrow, words)
    (part,) = (tmp_path / "work" / "parts" / "laws").glob("*.json")
    found = runner.read(part)
    assert found["fitted"]["tokens"] == pytest.approx(960, abs=24)
    for name in ("own", "unlike"):
        assert found[name]["patched"] != found[name]["cut"]
        assert len(found[name]["counts"]) == 4
