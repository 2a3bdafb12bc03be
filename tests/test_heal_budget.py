"""Healing on a budget of tokens or of time: what it buys, and that it goes on as it was begun."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from healings import Killed, curve, killing, models, options, stored, trainer_file
from isingcut.cli.main import app
from isingcut.data.tokens import TokenSet, pieces
from isingcut.errors import InputError, IsingcutError
from isingcut.files.writing import read_json
from isingcut.healing import recipe
from isingcut.healing.heal import heal
from isingcut.healing.training import train
from isingcut.options.config import HealConfig, RunConfig, heal_config

__all__ = ["models"]


def bought(folder):
    return read_json(folder / "healing.json", "healing")["recipe"]


def spending(models, out, effort, **changes):
    return options(models, out, effort=effort, **{"length": 64, "trainer": "", **changes})


def four(out, **more):
    """A trainer file of four sequences a step."""
    return trainer_file(out, {"per_device_train_batch_size": 4, "save_steps": 2, **more})


def test_small_budgets_make_many_small_steps(tmp_path):
    steps = []
    for tokens in (20_000, 80_000, 1_300_000, 50_000_000):
        batch, length, rate = recipe.sizes(HealConfig(), tokens, width=576)
        steps.append((tokens // (batch * length), batch * length, length))
        assert 2e-5 <= rate <= 3e-4
    assert steps == [(39, 512, 256), (39, 2048, 256), (158, 8192, 1024), (3051, 16384, 1024)]
    small, wide = (recipe.sizes(HealConfig(), 80_000, width=w)[2] for w in (576, 4096))
    assert small > wide > 2e-5
    settings = {"per_device_train_batch_size": 3, "learning_rate": 0.5}
    given = HealConfig(length=512, trainer=trainer_file(tmp_path / "t", settings))
    assert recipe.sizes(given, 80_000, width=576, longest=512) == (3, 512, 0.5)
    # Shared evenly by the processes.
    assert recipe.sizes(HealConfig(), 20_000, width=576, processes=3)[0] == 3


def test_samples_are_cut_into_pieces_that_begin_as_they_do():
    whole = TokenSet.from_rows([[7, *range(10, 19)], [7, 30, 31, 32, 33]], parts=["a", "b"])
    found = pieces(whole, 5)
    rows = [ids[m].tolist() for ids, m in zip(found.input_ids, found.mask, strict=True)]
    assert rows == [[7, 10, 11, 12, 13], [7, 14, 15, 16, 17], [7, 18], [7, 30, 31, 32, 33]]
    assert found.parts == ("a", "a", "a", "b")
    assert pieces(whole, 10) is whole
    # Without a token that all begin with there is none to repeat.
    other = pieces(TokenSet.from_rows([[1, 2, 3, 4], [5, 6]]), 2)
    assert other.input_ids.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_budget_in_tokens_is_spent(models, tmp_path):
    out = heal(spending(models, tmp_path / "out", "1.5k tokens", trainer=four(tmp_path)))
    found = bought(out)
    assert (found["steps"], found["batch"], found["length"]) == (5, 4, 64)
    assert found["tokens"] == 5 * 4 * 64
    assert found["seconds"] is None
    assert len(curve(out)) == 5
    assert read_json(out / "healing.json", "healing")["tokens_seen"] == 5 * 4 * 63
    trainer = four(tmp_path, num_train_epochs=1.0)
    once = heal(spending(models, tmp_path / "once", "1Gtokens", trainer=trainer))
    assert bought(once)["epochs"] == pytest.approx(1, abs=0.5)


def test_a_time_is_turned_into_steps_once(models, tmp_path, monkeypatch):
    # A step takes 0.6 seconds, and each of its tokens 5 milliseconds.
    times = [(64, 9.0), (64, 0.92), (64, 0.95), (512, 9.0), (512, 3.2), (512, 3.16)]
    monkeypatch.setattr(train, "step_times", lambda job: times)
    # What passes before is no part of this budget: the clock stands.
    monkeypatch.setattr(train.time, "monotonic", lambda: 1.0)
    config = spending(models, tmp_path / "a", "0.25m", trainer=four(tmp_path))
    whole = heal(config)
    found = bought(whole)
    assert found["steps"] == int(0.85 * 15 / (0.6 + 0.005 * 4 * 64)) == len(curve(whole))
    assert found["seconds"] == pytest.approx(found["steps"] * (0.6 + 0.005 * 4 * 64))
    config = config.replace(out=str(tmp_path / "b"))
    with pytest.raises(Killed):
        heal(config, progress=killing(3))
    # Another speed would give another schedule.
    monkeypatch.setattr(train, "step_times", lambda job: [(n, 3 * s) for n, s in times])
    heal(config)
    assert bought(tmp_path / "b") == found
    assert curve(tmp_path / "b") == curve(whole)
    assert stored(tmp_path / "b") == stored(whole)


def test_a_time_too_short_for_a_useful_step_is_refused_at_once(models, tmp_path):
    with pytest.raises(InputError, match=r"too short: judging .*10 steps .*give --effort 1min"):
        heal(spending(models, tmp_path / "out", "0.0001min"))
    assert not (tmp_path / "out").exists()


def test_a_budget_of_time_pays_for_the_judging_too(models, tmp_path, monkeypatch):
    spent = []
    monkeypatch.setattr(train, "_spend", lambda job: spent.append(job.spent) or job)
    heal(spending(models, tmp_path / "out", "1h", method="full", trainer=four(tmp_path)))
    assert spent[0] > 0


def test_the_clock_is_read_on_real_steps(models, tmp_path):
    # The text ends long before this time does, on any machine.
    out = heal(spending(models, tmp_path / "out", "2h"))
    found = bought(out)
    assert found["seconds"] > 0
    assert found["epochs"] == pytest.approx(recipe.EPOCHS, rel=0.2)
    assert found["batch"] == 8
    assert not list(tmp_path.glob(".out*"))


def test_a_runs_budget_is_that_of_its_healing():
    config = RunConfig(model="m", remove="2")
    assert (config.heal, config.replace(heal=True).heal) == ("", "all")
    assert RunConfig(heal=False) == RunConfig()
    assert heal_config(config.replace(heal="10min")).effort == "10min"
    assert heal_config(config.replace(heal=True)).effort == ""
    with pytest.raises(InputError, match=r"--heal: 'soon': expected a time \(10min, 2h\), tokens"):
        config.replace(heal="soon")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--heal", "--patch", "cubic"], "--patch must be"),
        (["--patch=linear", "--heal"], "gone"),
        (["--heal", "2h"], "gone"),
        (["--heal", "all"], "gone"),
        (["--heal", "9"], "--heal: '9': expected a time"),
        (["--heal=9"], "--heal: '9': expected a time"),
    ],
)
def test_a_switch_may_have_a_budget_behind_it(words, line, tmp_path):
    model, rest = str(tmp_path / "gone"), ["--remove", "2", "--out", str(tmp_path / "o")]
    for command in (["run", model, *rest, *words], ["run", *rest, *words, model]):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, IsingcutError), done.output
        assert line in str(done.exception)
