"""The verb `baseline` on a tiny run: the file it writes, its options, what it refuses."""

import shutil

import numpy as np
import pytest

import shared
from isingcut.data.calibration import Calibration
from isingcut.errors import InputError, UnknownNameError
from isingcut.files.writing import read_json
from isingcut.measure.losses import measure
from isingcut.runs import pipeline
from isingcut.runs.folder import RunFolder
from isingcut.runs.session import Session
from isingcut.runs.stages import baseline_part


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, text):
    """A run folder with a measured energy for two removals of six blocks."""
    return pipeline.energy(
        model=str(llama),
        calibration=str(text),
        out=str(tmp_path_factory.mktemp("comparison") / "run"),
        **{**shared.OPTIONS, "remove": "2", "also": "hessian", "keep": "0"},
    )


def call(capsys, *arguments):
    """Exit code and everything printed."""
    code, shown = shared.call(*arguments), capsys.readouterr()
    return code, shown.out + shown.err


def test_a_baseline_writes_its_choice_measured_on_the_ranking_split(capsys, folder):
    code, shown = call(capsys, "baseline", "sleb", folder)
    assert code == 0, shown
    found = read_json(folder / "baseline-sleb.json", "baseline")
    assert "sleb: blocks" in shown
    assert len(found["removed"]) == 2
    # The energy's own three samples, though the split holds more for the other energy.
    assert found["tokens_searched"] == 3 * 15
    assert found["violated"] == []
    session = Session(RunFolder.open(folder).config)
    replay = session.replay
    split = Calibration.load(folder / "calibration.safetensors").splits["rank"]
    state = np.isin(np.arange(6), found["removed"])
    assert found["kl"] == pytest.approx(measure(replay, split, state[None]).kl[0], rel=1e-5)
    assert not list(folder.glob("baseline*.journal"))


def test_a_method_that_is_gone_says_where_it_is(capsys, folder):
    code, shown = call(capsys, "baseline", "sliding-window-merging", folder)
    assert code == 2
    assert "there is no baseline 'sliding-window-merging' any more" in shown
    assert "docs/experiments.md" in shown


def test_the_papers_method_leaves_only_its_result(capsys, folder):
    assert call(capsys, "baseline", "cbo", folder, "--set", "top=5")[0] == 0
    found = read_json(folder / "baseline-cbo.json", "baseline")
    assert found["settings"] == ["top=5"]
    assert len(found["info"]["kl"]) == 5
    assert sorted(p.name for p in folder.glob("baseline-cbo*")) == ["baseline-cbo.json"]


def test_other_removals_and_options_have_files_of_their_own(capsys, folder):
    arguments = ("baseline", "block-influence", folder, "--remove", "3")
    assert call(capsys, *arguments, "--set", "iterative=true")[0] == 0
    found = read_json(folder / "remove-3" / "baseline-block-influence.json", "baseline")
    assert found["options"] == {"iterative": True}
    assert len(found["info"]["order"]) == 3
    code, shown = call(capsys, *arguments)
    assert code == 2
    assert "made with other options" in shown
    assert call(capsys, *arguments, "--overwrite")[0] == 0


def test_a_broken_constraint_is_said(capsys, folder):
    call(capsys, "baseline", "angular-window", folder, "--remove", "5")
    found = read_json(folder / "remove-5" / "baseline-angular-window.json", "baseline")
    expected = [] if found["removed"] == [1, 2, 3, 4, 5] else ["keep 0"]
    assert found["violated"] == expected
    # Five of six blocks, of which SLEB keeps two.
    code, shown = call(capsys, "baseline", "sleb", folder, "--remove", "5")
    assert code == 2
    assert "cannot remove 5 of 6" in shown


def test_ls_lists_the_baselines(capsys):
    assert "baselines: angular-window, block-influence" in call(capsys, "ls")[1]


def test_settings_are_read_with_the_type_of_their_default():
    part = baseline_part("evopress", ["survivors=[3, 1]", "step-tokens=[10,20]", "generations=2"])
    assert part.survivors == (3, 1)
    assert part.step_tokens == (10, 20)
    assert part.generations == 2


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("sleb", "keep_ends=3", "expected a value like True"),
        ("sleb", "iterative=true", "sleb has: loss, keep_ends"),
        ("random", "x=1", "random has: none"),
        ("evopress", "survivors=[a]", "expected a value like"),
        ("evopress", "generations=many", "expected a value like"),
        ("evopress", "survivors", "expected OPTION=VALUE"),
        ("evopress", "survivors=[", "cannot read the value"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, setting, words):
    with pytest.raises(InputError, match=words):
        baseline_part(name, [setting])


def test_an_unknown_baseline_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'sleb'"):
        baseline_part("slep", [])


def test_where_a_number_is_not_asked_for_as_many_go_as_were_chosen(capsys, folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    code, shown = call(capsys, "baseline", "random", out, "--budget", "params=30%")
    assert code == 2
    assert f"type: isingcut rank {out} --budget params=30%" in shown
    for verb in ("solve", "rank"):
        assert call(capsys, verb, out, "--budget", "params=30%")[0] == 0
    assert call(capsys, "baseline", "random", out, "--budget", "params=30%")[0] == 0
    place = out / "remove-params-30_"
    chosen = read_json(place / "candidates.json", "candidates")["chosen"]["removed"]
    found = read_json(place / "baseline-random.json", "baseline")
    assert len(found["removed"]) == len(chosen)
