"""The accuracy benchmark: what its methods remove, scales, figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isingcut.errors import InputError
from isingcut.evaluation.likelihoods import answer_scores
from isingcut.ising.states import states_of
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.testing.tiny import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _accuracy_states as choosing
import _accuracy_summary as summary
import accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def replay_of(model: Any) -> Replay:
    return Replay(model, stack_modules(model, find_stack(model)))


def test_the_stream_is_scaled_behind_a_cut(folder: Path) -> None:
    model = load(folder, dtype="float32").model
    replay, ids = replay_of(model), (5, 9, 20, 31, 7)
    scale = torch.linspace(0.5, 2.0, model.config.hidden_size)
    scaled = choosing.Scaled(replay, {"one": {2: scale}, "other": {2: scale / 3}})
    removals = [scaled.removal([1, 2]), scaled.removal([1, 2], "one"), scaled.removal([])]
    assert removals[:2] == [[1, 2, 3, 4], [1, 2, 4]]
    row, work = [(ids, 2)], Work(64)
    likely = answer_scores(scaled, row, states_of(len(scaled), map(tuple, removals)), work)[0]
    plain = answer_scores(replay, row, states_of(len(replay), [(1, 2), ()]), work)[0]
    recording = replay.record(torch.tensor([ids[:-1]]))
    with torch.no_grad():
        stream = recording.block(0, recording.entered) * scale
        for i in range(3, len(replay)):
            stream = recording.block(i, stream)
        logp = torch.log_softmax(replay.tail(stream, torch.tensor([ids[:-1]]))[0].double(), -1)
    direct = float(logp[2, ids[3]] + logp[3, ids[4]])
    assert likely[1, 0] == pytest.approx(direct, abs=1e-5)
    assert likely[[0, 2], 0].tolist() == plain[:, 0].tolist()
    assert abs(plain[0, 0] - direct) > 1e-3


def test_scales_are_the_ratios_of_the_streams_sizes() -> None:
    lengths = torch.tensor([1.0, 2.0, 4.0, 5.0, 10.0])
    channels = torch.stack([lengths, 3 * lengths], 1)
    channels[4, 1] = 60.0
    assert choosing.runs([3, 0, 1]) == [(0, 1), (3, 3)]
    by_length = choosing.scales("length", [0, 1, 3], (lengths, channels))
    assert {b: s.tolist() for b, s in by_length.items()} == {1: [4.0], 3: [2.0]}
    by_channel = choosing.scales("channel", [0, 1, 3], (lengths, channels))
    assert by_channel[3].tolist() == pytest.approx([2.0, 4.0])


def test_every_method_removes_as_many_blocks_as_asked(folder: Path) -> None:
    loaded = load(folder)
    replay = replay_of(loaded.model)
    ids = torch.randint(6, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    tokens = choosing.TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4))
    energy = choosing.paper_energy(replay, tokens, Work(64))
    assert energy["samples"] == 4
    for method in choosing.METHODS:
        if top := choosing.PAPER.get(method):
            found = choosing.choose_by(energy, top, replay, tokens, 2, Work(64))
        else:
            found = choosing.choose(method, replay, tokens, 2, Work(64), 0)
        assert len(set(found["removed"])) == 2, method
        assert found["removed"] == sorted(found["removed"])
        assert (found["passes"] == 0) == (method in ("last", "cbo"))
        # The best of the lowest is the one of the lowest measured loss.
        assert method != "cbo-top20" or found["kl"][found["position"]] == min(found["kl"])
    n = len(replay)
    assert choosing.choose("last", replay, tokens, 2, Work(64), 0)["removed"] == [n - 2, n - 1]


def stages(**right: str) -> dict[str, Any]:
    return {
        "removed": [1, 2],
        "passes": 3.0,
        "stages": {
            stage: {"accuracy": {"piqa": {"metric": "acc", "right": r}}, "losses": {}}
            for stage, r in right.items()
        },
    }


def test_figures_are_paired_differences_in_points(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "isingcut": stages(cut="11110000", healed="11111100"),
        "sleb": stages(cut="11000000", healed="11111110"),
        "block-influence": stages(cut="11110000", healed="11000000"),
    }
    summary.show(
        {
            "settings": {},
            "tasks": ["piqa"],
            "original": {"accuracy": {"piqa": {"metric": "acc", "right": "11111111"}}},
            "removals": {"4": rows},
        }
    )
    said = dict(
        line.split(": ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("accuracy_minus", "healed_accuracy"))
    )
    error = 100 * np.std([0, 0, 1, 1, 0, 0, 0, 0], ddof=1) / np.sqrt(8)
    assert float(said["accuracy_minus_sleb_4"]) == 25.0
    assert float(said["accuracy_minus_sleb_4_se"]) == pytest.approx(error, rel=1e-3)
    assert float(said["accuracy_minus_block_influence_4"]) == 0.0
    assert float(said["healed_accuracy_minus_best_peer_4"]) == -12.5
    assert "accuracy_minus_window_4" not in said


def test_a_mean_is_over_the_tasks_that_every_model_of_the_stage_was_asked() -> None:
    rows = {"isingcut": stages(cut="1100", healed="1110"), "sleb": stages(cut="1000")}
    rows["isingcut"]["stages"]["cut"]["accuracy"]["boolq"] = {"metric": "acc", "right": "0000"}
    asked = {s: summary._asked(rows, s, ["piqa", "boolq"]) for s in summary._stages(rows)}
    assert asked == {"cut": ["piqa"], "healed": ["piqa"]}
    assert dict(summary._figures("4", rows, asked))["accuracy_minus_sleb_4"] == 25.0


def test_questions_are_counted_by_task() -> None:
    given = accuracy.parser().parse_args(["--questions", "20", "boolq=7"])
    assert dict(given.questions) == {"each": 20, "boolq": 7}


def test_a_results_file_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    def options(work: str) -> Any:
        found = accuracy.parser().parse_args(["--model", str(folder), "--remove", "1"])
        found.work, found.tasks = str(tmp_path / work), ["piqa", "boolq"]
        found.methods, found.questions = ["last", "isingcut"], {"each": 2}
        return found

    def row(right: str) -> dict[str, str]:
        return {"metric": "acc", "dtype": "float32", "right": right}

    def losses(kl: float) -> dict[str, Any]:
        return {t: {"kl": [kl], "nll": [2.0], "counts": [7]} for t in summary.Bench.judged_names}

    def stage(right: str, kl: float, **more: Any) -> dict[str, Any]:
        return {"accuracy": {"piqa": row(right), "boolq": row("11"), **more}, "losses": losses(kl)}

    solved = {"gsm8k": {**row("1"), "metric": "exact_match,flexible-extract"}}
    ours = {"cut": stage("01", 0.2, **solved), "length": stage("00", 0.5)}
    ours |= {"tuned": stage("10", 0.1), "healed": stage("11", 0.1, **solved)}
    bench = summary.Bench(options("work"))
    written = {
        "settings": {k: getattr(bench.options, k) for k in summary.SETTINGS},
        "provenance": {},
        "tasks": ["piqa", "boolq"],
        "original": {"accuracy": stage("11", 0.0, **solved)["accuracy"]},
        "losses": losses(0.0),
        "removals": {
            "1": {
                "last": {"removed": [3], "passes": 0.0, "stages": {"cut": stage("00", 0.9)}},
                "isingcut": {"removed": [1], "passes": 4.0, "stages": ours},
            }
        },
    }
    path = tmp_path / "results.json"
    summary.write_json(path, summary.RESULTS, written)
    summary.restore(bench, path)
    found = summary.collect(bench, tmp_path / "again.json")
    for part in ("tasks", "original", "losses", "removals"):
        assert found[part] == written[part], part
    # What is not known is asked, and nothing is chosen again.
    assert set(bench.variants()) - set(bench.gathered("shared/piqa")) == {"1 channel"}
    folders = [part.name.rpartition("/")[0] for part in bench.parts()]
    tasks, texts = ["shared/piqa", "shared/boolq"], bench.judged_names
    assert folders == [*(f"losses/{text}" for text in texts), *tasks]
    # Fewer answers are not taken for more, unless the file has none of that task.
    other = options("other")
    other.questions = {"each": 2, "hellaswag": 5, "piqa": 3}
    with pytest.raises(InputError, match="was made with piqa 2, not 3; give the same"):
        summary.restore(summary.Bench(other), path)
    del other.questions["piqa"]
    other.work = str(tmp_path / "more")
    summary.restore(summary.Bench(other), path)
