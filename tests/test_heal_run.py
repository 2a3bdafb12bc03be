"""Healing and benchmarks as stages of a run, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from healings import write_text
from isingcut.cli.main import app
from isingcut.errors import InputError
from isingcut.files.writing import read_json
from isingcut.models.load import load
from isingcut.options.config import RunConfig
from isingcut.runs import pipeline
from isingcut.runs.session import Session
from isingcut.testing.tiny import tiny_checkpoint
from shared import leave_speed_out
from test_tasks import arc, lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    tiny_checkpoint("llama", place / "model")
    write_text(place / "text.jsonl", 200)
    training = "per_device_train_batch_size: 4\nmax_steps: 3\nlearning_rate: 0.0005\n"
    (place / "trainer.yaml").write_text(training, encoding="utf-8")
    options = f"length: 32\nreport-samples: 2\ntrainer: {place / 'trainer.yaml'}\n"
    (place / "heal.yaml").write_text(options, encoding="utf-8")
    lines(place / "data" / "arc_easy" / "test.jsonl", [arc(i)[1] for i in range(6)])
    articles = [{"text": f"The mill of {i}. " * 4} for i in range(5)]
    lines(place / "data" / "wikitext2" / "test_raw.jsonl", articles)
    return place


def config(folder, name, **changes):
    return RunConfig(
        model=str(folder / "model"),
        remove="2",
        energy="fisher",
        out=str(folder / name),
        calibration=str(folder / "text.jsonl"),
        samples=3,
        length=32,
        rank_samples=2,
        report_samples=2,
        states=4,
        random_states=30,
        keep="0",
        dtype="float32",
        device="cpu",
        heal_options=str(folder / "heal.yaml"),
    ).replace(**changes)


@pytest.fixture(scope="module")
def run(folder):
    with pytest.MonkeyPatch.context() as patched:
        leave_speed_out(patched.setattr)
        yield pipeline.run(config(folder, "run", heal=True))


def test_a_run_heals_what_the_ranking_chose(run: Path) -> None:
    chosen = read_json(run / "candidates.json", "candidates")["chosen"]
    cut = json.loads((run / "model" / "isingcut.json").read_text(encoding="utf-8"))
    assert cut["removed"] == chosen["removed"]
    assert cut["patch"]["cuts"]
    found = read_json(run / "healing.json", "healing")
    assert found["removed"] == cut["removed"]
    # It was patched before.
    assert (found["start"], found["options"]["patch"]) == ("patched", "none")
    assert len(found["steps"]) == 3
    assert found["after"]["kl"] < found["before"]["kl"]
    # The final model is the healed one.
    healed = load(run / "healed", dtype="float32", device="cpu")
    count = sum(p.numel() for p in healed.model.parameters())
    evaluation = read_json(run / "evaluation.json", "evaluation")
    assert evaluation["after"]["parameters"] == count
    assert evaluation["last"] == "healed"
    kls = [evaluation["cut"]["kl"], evaluation["patched"]["kl"], evaluation["kl"]]
    assert kls == sorted(kls, reverse=True)
    assert not (run / "cut").exists()
    card = (run / "healed" / "README.md").read_text(encoding="utf-8")
    assert card.index("## Patched") < card.index("After the patch, it was distilled")
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "| | original | cut | patched | healed | change |" in report
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_the_same_command_does_nothing_again(folder, run, monkeypatch):
    def refused(*arguments, **rest):
        raise AssertionError("healed again")

    monkeypatch.setattr("isingcut.runs.cutting.heal_checkpoint", refused)
    pipeline.run(config(folder, "run", heal=True))


def test_benchmarks_of_a_run_from_the_command_line(folder, run):
    command = ["evaluate", str(run), "--tasks", "arc_easy,wikitext2"]
    command += ["--data", str(folder / "data"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    (row,) = answer["benchmarks"]["rows"]
    assert (row["task"], row["n"]) == ("arc_easy", 6)
    assert answer["benchmarks"]["wikitext2"]["tokens"] > 0
    stored = read_json(run / "benchmarks.json", "benchmarks")
    assert stored["rows"] == [row]
    assert set(row) >= {"task", "metric", "original", "original_se", "cut", "cut_se", "n"}


def test_a_checkpoint_against_its_original(folder, run, tmp_path):
    command = ["evaluate", str(run / "healed"), "--original", str(folder / "model")]
    command += ["--tasks", "arc_easy", "--data", str(folder / "data")]
    command += ["--out", str(tmp_path / "scores.json"), "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "acc, n = 6, p = " in done.stdout
    assert read_json(tmp_path / "scores.json", "benchmarks")["rows"][0]["n"] == 6


def test_a_checkpoint_given_as_a_run_is_told_how_to_be_compared(run):
    done = CliRunner().invoke(app, ["evaluate", str(run / "healed"), "--tasks", "arc_easy"])
    assert isinstance(done.exception, InputError)
    assert "add --original MODEL" in str(done.exception)


def test_heal_from_the_command_line(folder, run, tmp_path):
    command = ["heal", str(run / "model"), "--teacher", str(folder / "model")]
    command += ["--text", str(folder / "text.jsonl"), "--length", "32", "--report-samples", "2"]
    command += ["--samples", "4", "--effort", "100 tokens", "--device", "cpu"]
    command += ["--dtype", "float32", "--out", str(tmp_path / "healed")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    heads = done.stdout.splitlines()[2].replace("┃", " ").split()
    assert heads == ["original", "patched", "healed"]
    assert (tmp_path / "healed" / "healing.json").exists()


def test_what_a_run_refuses_before_it_measures(folder, tmp_path):
    def refused(**changes):
        with pytest.raises(InputError) as caught:
            pipeline.run(config(folder, "never", **changes))
        assert not (folder / "never").exists()
        return str(caught.value)

    (tmp_path / "bad.yaml").write_text("teacher: x\n", encoding="utf-8")
    assert "the run itself sets" in refused(heal=True, heal_options=str(tmp_path / "bad.yaml"))
    assert "--patch must be one of" in refused(patch="cubic")
    assert "range of removals" in refused(heal=True, remove="1..2")


def test_a_streamed_model_is_not_healed(folder: Path) -> None:
    from isingcut.runs.cutting import check_healing

    session = Session(config(folder, "never", heal=True, stream="on"))
    with pytest.raises(InputError, match="cannot be healed in the run"):
        check_healing(session)
