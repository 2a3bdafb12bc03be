"""Healing and benchmarks as stages of a run, from the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from healings import trainer_file, write_text
from isingcut.cli.main import app
from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files.documents.scores import (
    ComparedCandidate,
    HealedCandidates,
    HealingRecipe,
    HealingStop,
)
from isingcut.files.documents.states import BaselineFile, CandidatesFile, MeasuredState
from isingcut.files.writing import read_document, read_json, write_json
from isingcut.healing.job import Race
from isingcut.models.load import load
from isingcut.options.config import RunConfig
from isingcut.options.healing import HealConfig
from isingcut.runs import healing_stages, pipeline, trials
from isingcut.runs.api import open_run
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
        yield pipeline.run(config(folder, "run", heal=True, heal_top=2))


def test_a_run_chooses_among_healed_candidates_and_heals(run):
    chosen = read_json(run / "healed-candidates.json", "healed-candidates")
    rows = chosen["candidates"]
    assert len(rows) == 2
    assert chosen["chosen"] == min(rows, key=lambda r: r["kl"])
    cut = json.loads((run / "model" / "isingcut.json").read_text(encoding="utf-8"))
    assert cut["removed"] == chosen["chosen"]["removed"]
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

    monkeypatch.setattr("isingcut.runs.healing_stages.heal_checkpoint", refused)
    pipeline.run(config(folder, "run", heal=True, heal_top=2))


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
    assert "set by the run itself" in refused(heal=True, heal_options=str(tmp_path / "bad.yaml"))
    assert "give --heal or --patch too" in refused(heal_top=2, patch="none")
    assert "range of removals" in refused(heal=True, remove="1..2")


def test_a_streamed_model_is_not_healed(folder):
    from isingcut.runs.healing_options import check

    session = Session(config(folder, "never", heal=True, stream="on"))
    with pytest.raises(InputError, match="cannot be healed in the run"):
        check(session)


TEXT = HealingText(
    TokenSet.from_rows([[1] * 1024] * 300), TokenSet.from_rows([[1] * 8] * 2), "documents", 0.0
)


def heal_options(place, name, **settings):
    """A file of options with a trainer file of four samples a step."""
    trainer = trainer_file(place / name, {"per_device_train_batch_size": 4, **settings})
    options = place / f"{name}.yaml"
    options.write_text(f"length: 32\nreport-samples: 2\ntrainer: {trainer}\n", encoding="utf-8")
    return options


@pytest.fixture(scope="module")
def tried(folder):
    """A run that healed in a budget of tokens and compared three candidates before."""
    options = heal_options(folder, "budget", learning_rate=0.003)
    with pytest.MonkeyPatch.context() as patched:
        leave_speed_out(patched.setattr)
        given = {
            "heal": "9ktokens",
            "heal_top": 3,
            "heal_options": str(options),
            "rank_samples": 4,
            "keep": "",
        }
        yield pipeline.run(config(folder, "tried", **given))


def test_three_candidates_are_tried_within_a_third(tried):
    found = read_json(tried / "healed-candidates.json", "healed-candidates")
    rows = found["candidates"]
    assert len(rows) == 3
    assert rows[0]["source"] == "spectrum"
    assert len({tuple(r["removed"]) for r in rows}) == 3
    full = [r for r in rows if r["dropped"] is None]
    assert {r["steps"] for r in full} == {int(1000 / 128)}
    assert found["chosen"] == min(full, key=lambda r: r["kl"])
    assert sum(r["tokens"] for r in rows) <= 3000
    for row in rows:
        assert (row["difference"] is None) == (row == found["chosen"])
        if row["dropped"]:
            assert row["difference"] > 2 * row["difference_se"]
    healing = read_json(tried / "healing.json", "healing")
    left = 9000 - sum(r["tokens"] for r in rows)
    assert healing["options"]["effort"] == f"{left}tokens"
    assert healing["recipe"]["steps"] == int(left / 128)
    assert healing["removed"] == found["chosen"]["removed"]
    one_pass = [read_json(p, "baseline") for p in tried.glob("baseline-*.json")]
    assert {b["baseline"] for b in one_pass} == set(trials.ONE_PASS)
    assert not list(tried.glob(".*"))
    report = (tried / "report.md").read_text(encoding="utf-8")
    assert "3 candidates were healed for 7 steps on the same text" in report


def test_a_second_call_loads_no_model(folder, tried):
    session, opened = reopened(folder, tried)
    found = read_document(tried / "healed-candidates.json", HealedCandidates)
    assert trials.choose(session, opened) == found
    assert "loaded" not in vars(session)


def reopened(folder, run):
    from isingcut.runs.folder import RunFolder
    from isingcut.runs.session import Session

    opened = RunFolder.open(run)
    return Session(opened.config), opened


@pytest.mark.parametrize(
    ("count", "influence", "wanted"),
    [
        (1, [2, 3], [[4, 5]]),
        (2, [2, 3], [[4, 5], [2, 3]]),
        # It is the best already: another of one pass comes in its place.
        (2, [4, 5], [[4, 5], [6, 7]]),
        # No near copy of those that are there, as long as there is another.
        (4, [2, 3], [[4, 5], [2, 3], [8, 9], [6, 7]]),
        (6, [2, 3], [[4, 5], [2, 3], [8, 9], [6, 7], [4, 6], [4, 8]]),
    ],
)
def test_the_pool_is_diverse(count, influence, wanted, folder, tried, monkeypatch):
    session, opened = reopened(folder, tried)
    rows = [([4, 6], 1.1), ([4, 5], 1.0), ([8, 9], 1.3), ([4, 8], 1.2)]
    measured = [MeasuredState.model_construct(removed=blocks, kl=kl) for blocks, kl in rows]
    content = CandidatesFile.model_construct(candidates=measured)
    monkeypatch.setattr(opened, "load", lambda path, read: content)
    choices = {
        "block-influence": BaselineFile.model_construct(removed=influence, kl=1.5, violated=[]),
        "angular-window": BaselineFile.model_construct(removed=[6, 7], kl=2.0, violated=[]),
    }
    monkeypatch.setattr(trials, "compare", lambda session, folder, name: choices[name])
    assert [r["removed"] for r in trials._pool(session, opened, count)] == wanted
    choices["angular-window"].violated.append("keep")
    assert [6, 7] not in [r["removed"] for r in trials._pool(session, opened, count)]


@pytest.mark.parametrize(
    ("options", "effort"),
    [
        ({"effort": "90ktokens"}, "10000tokens"),
        ({"effort": "9min"}, "1.000000min"),
        # All of the text: once.
        ({}, f"{300 * 1024 // 9}tokens"),
        ({"max_steps": 30}, f"{30 * 16 * 1024 // 9}tokens"),
        ({"method": "none"}, ""),
    ],
)
def test_what_a_trial_may_take(options, effort, tmp_path):
    if "max_steps" in options:
        options = {"trainer": trainer_file(tmp_path / "t", options)}
    assert trials._few(HealConfig(**options), TEXT, 3).effort == effort


def test_the_rest_of_a_budget_is_the_healings():
    spent = ((1000, 30.0), (500, 15.0))
    rows = [ComparedCandidate.model_construct(tokens=t, seconds=s) for t, s in spent]
    assert healing_stages._left("10ktokens", rows) == "8500tokens"
    assert healing_stages._left("2min", rows) == "1.250000min"
    assert healing_stages._left("", rows) == ""
    # Trials may have taken longer than their share.
    assert healing_stages._left("0.5min", rows) == "0.166667min"
    assert healing_stages._left("1500tokens", rows) == "500tokens"


def test_a_small_budget_compares_nothing(folder, tried, monkeypatch):
    """And where it does, the others train as the first did, whatever the clock says."""
    session, opened = reopened(folder, tried)
    session.config = session.config.replace(heal_top=None)
    monkeypatch.setattr(trials, "text_of", lambda *given: TEXT)
    recipe = HealingRecipe(
        steps=10, batch=4, length=256, learning_rate=3e-4, tokens=10240, seconds=8.0, epochs=0.1
    )
    given = []

    def train(session, few, removed, text, *rest):
        given.append((rest[-1], int(text.train.mask.sum(1).max())))
        row = {"removed": list(removed), "kl": 1.0, "steps": 5, "tokens": 9, "seconds": 99.0}
        return {**row, "dropped": None, "checks": [], **({} if rest[-1] else {"recipe": recipe})}

    monkeypatch.setattr(trials, "_tried", train)
    pool = [{"removed": [k, k + 1], "kl": 1.0, "source": "spectrum"} for k in range(3)]
    healing = HealConfig(effort="1min")
    rows = trials._trials(session, opened, healing, pool)
    assert len(rows) == 1
    # Half of its steps, half of its time.
    assert rows[0]["seconds"] == 4.0
    recipe.steps = 40
    given.clear()
    rows = trials._trials(session, opened, healing, pool)
    assert [row["seconds"] for row in rows] == [1.0] * 3
    assert given == [(None, 1024), (recipe, 256), (recipe, 256)]


def test_a_candidate_that_is_behind_is_dropped_on_the_way(folder, tmp_path, monkeypatch):
    real = Race.verdict

    def behind(self, checks):
        assert real(self, checks[:1]) is None
        leads = not self._leader
        return None if leads or checks[-1].step != 2 else HealingStop(why="behind", kept=None)

    monkeypatch.setattr(Race, "verdict", behind)
    leave_speed_out(monkeypatch.setattr)
    # A third of it, shared by two.
    options = heal_options(tmp_path, "o", max_steps=24)
    given = {"heal": True, "heal_top": 2, "heal_options": str(options), "out": str(tmp_path / "r")}
    run = pipeline.run(config(folder, "dropped", **given))
    rows = read_json(run / "healed-candidates.json", "healed-candidates")["candidates"]
    assert [(r["steps"], r["dropped"]) for r in rows] == [(4, None), (2, "behind")]
    assert read_json(run / "healing.json", "healing")["removed"] == rows[0]["removed"]
    assert "dropped" in (run / "report.html").read_text(encoding="utf-8")


def test_old_files_of_healed_candidates_are_read(tmp_path):
    row = {"removed": [1], "kl": 1.0, "kl_se": None, "perplexity": 3.0, "kl_before": 2.0}
    file = tmp_path / "healed-candidates.json"
    write_json(file, "healed-candidates", {"candidates": [row], "chosen": row})
    assert read_json(file, "healed-candidates")["chosen"] == row


def test_what_a_search_began_with_is_not_measured_again(folder, monkeypatch):
    def compare(*_):
        raise AssertionError("one pass is in the ranking already")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "compare", compare)
    pools = []
    monkeypatch.setattr(trials, "_trials", lambda *given: pools.append(given[-1]) or stop())
    given = {"heal": True, "heal_top": 3, "energy": "refined", "samples": 4, "rank_samples": 4}
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config(folder, "searched", keep="", **given))
    states = [tuple(row["removed"]) for row in pools[0]]
    assert len(set(states)) == 3
    ranked = read_json(folder / "searched" / "candidates.json", "candidates")
    quick = {tuple(row["removed"]) for row in ranked["one_pass"]["states"]}
    # One of them is tried: the best of the spectrum, or the next.
    assert quick & set(states[:2])


def test_how_many_are_tried():
    plain = RunConfig(model="m", remove="2")
    assert plain.tried == 0
    assert plain.replace(heal="10min").tried == 3
    assert plain.replace(heal="50ktokens").tried == 3
    # A third of a short time, shared by three, says nothing.
    assert plain.replace(heal="5min").tried == 0
    assert plain.replace(heal="5min", heal_top=3).tried == 3
    assert plain.replace(heal=True, heal_top=1).tried == 0
    assert plain.replace(heal=True, heal_top=0).tried == 0
    assert plain.replace(heal_top=4).tried == 4
    # Chosen in another way.
    assert plain.replace(heal="10min", choose="ground").tried == 0
    assert plain.replace(heal="10min", choose="ground", heal_top=2).tried == 2


def test_the_python_api_takes_the_choice_after_healing(tried):
    found = read_json(tried / "healed-candidates.json", "healed-candidates")
    assert open_run(tried).config.heal == "9ktokens"
    assert found["chosen"]["removed"] == read_json(tried / "healing.json", "healing")["removed"]
