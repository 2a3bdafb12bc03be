"""The checks for whoever has a GPU: their table and exit codes, and one that a fake card passes."""

import json

import pytest

from isingcut.errors import InputError
from isingcut.testing import gpu
from isingcut.testing.cards import fake_cards


def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpu.main(["--out", str(tmp_path / "found.json")]) == 2
    assert capsys.readouterr().out.startswith("no GPU found: ")
    assert not (tmp_path / "found.json").exists()


def test_an_unknown_check_is_named(capsys):
    assert gpu.main(["--only", "agree,agre"]) == 2
    assert "unknown check 'agre'" in capsys.readouterr().out


def refuse(place):
    raise InputError("no\nroom")


def skip(place):
    raise gpu.Skipped("needs two GPUs")


@pytest.mark.parametrize(
    ("check", "outcome", "words", "code"),
    [
        (lambda place: f"on {place.device}", "passed", "on lazy:0", 0),
        (skip, "skipped", "needs two GPUs", 0),
        (refuse, "failed", "no room", 1),
        (lambda place: gpu.close(1.0, 1.1), "failed", "differs by 9.1e-02 of its size", 1),
        (lambda place: {}["x"], "failed", "KeyError('x')", 1),
    ],
)
def test_what_a_check_does_is_in_the_table_the_file_and_the_exit_code(
    check, outcome, words, code, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu, "CHECKS", {"fine": lambda place: "yes", "one": check})
    with fake_cards() as (card,):
        given = ["--device", str(card.device), "--out", str(tmp_path / "found.json")]
        assert gpu.main([*given, "--only", "fine,one"]) == code
    shown = capsys.readouterr().out
    assert f"gpu_checks_failed: {code}" in shown
    assert outcome in shown
    row = json.loads((tmp_path / "found.json").read_text())["checks"][1]
    assert (row["check"], row["outcome"]) == ("one", outcome)
    assert row["words"].startswith(words)
    assert ("Traceback" in row["traceback"]) == (outcome == "failed")


def test_gradients_computed_twice_pass_on_a_fake_card(tmp_path):
    with fake_cards() as (card,):
        place = gpu.Place.make(card.device, tmp_path)
        assert gpu.twice(place) == "equal bits"
