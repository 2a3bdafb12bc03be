"""The checks for whoever has a GPU, carried out on a fake card, and where there is none."""

import json

import pytest

from isingcut.testing import gpu
from isingcut.testing.cards import fake_cards


def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpu.main(["--out", str(tmp_path / "found.json")]) == 2
    assert capsys.readouterr().out.startswith("there is no GPU to check: ")
    assert not (tmp_path / "found.json").exists()


def test_an_unknown_check_is_named(capsys):
    assert gpu.main(["--only", "agree,agre"]) == 2
    assert "no check 'agre'" in capsys.readouterr().out


def test_checks_that_numbers_answer_pass_on_a_fake_card(capsys, tmp_path):
    with fake_cards() as (card,):
        only = "agree,streamed,twice,processes,experts"
        code = gpu.main(
            ["--device", str(card.device), "--only", only, "--out", str(tmp_path / "found.json")]
        )
    found = json.loads((tmp_path / "found.json").read_text())
    outcomes = {row["check"]: row["outcome"] for row in found["checks"]}
    assert outcomes.pop("processes") == "skipped"
    assert set(outcomes.values()) == {"passed"}, capsys.readouterr().out
    assert code == 0


def test_a_wrong_number_fails_a_check(capsys, tmp_path, monkeypatch):
    true = gpu.gate_gradients
    monkeypatch.setattr(
        gpu,
        "gate_gradients",
        lambda replay, tokens: true(replay, tokens) * (1 + 1e-3 * (replay.device.type != "cpu")),
    )
    with fake_cards() as (card,):
        code = gpu.main(
            ["--device", str(card.device), "--only", "agree", "--out", str(tmp_path / "f.json")]
        )
    assert code == 1
    assert "gpu_checks_failed: 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_beside_memory_that_is_taken_passes_on_a_fake_card(capsys, tmp_path):
    with fake_cards(budget=2**30) as (card,):
        code = gpu.main(
            ["--device", str(card.device), "--only", "crowded", "--out", str(tmp_path / "f.json")]
        )
    assert code == 0, capsys.readouterr().out
