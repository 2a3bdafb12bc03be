"""Passages that stand in two splits are counted, kept and warned of; ordinary text has none."""

import numpy as np
import pytest

from isingcut.data import healing_text
from isingcut.data.tokens import TokenSet, overlap
from isingcut.files.writing import read_json
from isingcut.report.words import overlap_warnings
from shared import call, write_words

SIZES = {"samples": 4, "rank_samples": 4, "report_samples": 4, "length": 64}


def counted(tokens, others, size):
    """The same by sets of tuples."""

    def grams(split):
        kept = split.mask if split.counted is None else split.counted
        return [
            tuple(row[i : i + size].tolist())
            for row, counts in zip(split.input_ids, kept, strict=True)
            for i in range(len(row) - size + 1)
            if counts[i + size - 1]
        ]

    seen = {gram for other in others for gram in grams(other)}
    own = grams(tokens)
    return sum(gram in seen for gram in own) / len(own)


@pytest.mark.parametrize(("length", "size"), [(16, 8), (40, 16), (70, 32)])
def test_the_share_is_that_of_a_plain_count(length, size):
    rng = np.random.default_rng(length)
    passage = rng.integers(0, 90, 40).tolist()

    def split(rows):
        found = []
        for _ in range(rows):
            row = rng.integers(0, 90, length).tolist()
            # At another place in each, and cut short by the end of some.
            at = int(rng.integers(0, length))
            found.append([*row[:at], *passage][:length])
        # Context that does not count.
        found[0] = [~i for i in found[0][: length // 2]] + found[0][length // 2 :]
        return TokenSet.from_rows(found)

    first, *others = split(30), split(9), split(20)
    share = overlap(first, others)
    assert share == counted(first, others, size)
    assert 0.05 < share < 0.9


def test_samples_too_short_for_chance_share_nothing():
    same = TokenSet.from_rows([[1] * 15])
    assert overlap(same, [same]) == 0.0
    assert overlap(TokenSet.from_rows([[1] * 16]), [TokenSet.from_rows([[1] * 3])]) == 0.0


@pytest.fixture
def leaking(tmp_path):
    """A text of which one passage comes again and again."""
    words = write_words(tmp_path / "words.txt").read_text(encoding="utf-8")
    parts = [words[i : i + 150] + words[-90:] for i in range(0, 3000, 150)]
    path = tmp_path / "leaking.txt"
    path.write_text(" ".join(parts), encoding="utf-8")
    return path


def test_a_run_says_how_much_its_splits_share(leaking, llama, tmp_path, no_speed, capsys):
    out = tmp_path / "run"
    options = [llama, "--calibration", leaking, "--out", out, "--energy", "pairwise", "--quiet"]
    for name, value in SIZES.items():
        options += [f"--{name.replace('_', '-')}", value]
    further = ["--remove", 1, "--states", 3, "--random-states", 30, "--patch", "none"]
    for verb, given in {"energy": options, "run": options + further}.items():
        assert call(verb, *given) == 0
        shares = read_json(out / "run.json", "run")["provenance"]["calibration"]["overlap"]
        assert shares.keys() == {"rank", "report"}
        assert 0.05 < shares["report"] < 0.5
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "another split" in x]
        assert line.startswith("isingcut: warning: ")
        assert f"{shares['report']:.0%} of the report text stands in another split too" in line


def test_ordinary_text_is_not_warned_of(finished):
    provenance = read_json(finished / "run.json", "run")["provenance"]
    assert provenance["calibration"]["overlap"] == {"rank": 0.0, "report": 0.0}
    assert overlap_warnings(provenance["calibration"]["overlap"]) == []
    assert overlap_warnings({"rank": 0.019}) == []


def test_a_healing_knows_what_its_report_shares(leaking, tokenizer):
    text = healing_text.build(
        str(leaking), tokenizer, samples=20, report_samples=9, length=64, seed=0
    )
    assert text.overlap == counted(text.report, [text.train], 32) > 0.1
