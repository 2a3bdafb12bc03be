"""The refined search through the pipeline: one removal, a range, a budget in parameters."""

import json

import pytest

import isingcut
from isingcut.errors import InputError
from isingcut.files.documents import CandidatesFile, OnePass, OnePassLoss
from isingcut.files.writing import read_document, read_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig
from isingcut.report.run_files import RunFiles
from isingcut.report.words import sentence
from isingcut.runs.measuring import concrete
from shared import OPTIONS, call

pytestmark = pytest.mark.usefixtures("no_speed")
LITTLE = {**OPTIONS, "energy": "refined", "effort": "6", "samples": 4, "states": 4}


@pytest.fixture(scope="module")
def inputs(shared, text):
    model = shared.checkpoint(num_hidden_layers=8)
    return {"model": str(model), "calibration": str(text), **LITTLE}


@pytest.mark.parametrize(
    ("asked", "energy"),
    [
        ({}, "pairwise"),
        ({"remove": "3"}, "refined"),
        ({"budget": "params=20%"}, "refined"),
        ({"energy": "fisher", "remove": "3"}, "fisher"),
    ],
)
def test_auto_is_the_search_where_a_removal_is_given(asked, energy):
    assert concrete(RunConfig(model="m", calibration="c", out="o", **asked)).energy == energy


def test_what_the_search_found_is_ranked_and_cut(inputs, tmp_path):
    out = isingcut.run(
        **{**inputs, "states": 2, "effort": "20"}, remove="3", out=str(tmp_path / "run")
    )
    energy = Hamiltonian.load(out / "hamiltonian.safetensors")
    finalists = energy.meta["search"]["targets"]["3"]["finalists"]
    ranked = [r["removed"] for r in read_json(out / "candidates.json", "candidates")["candidates"]]
    assert all(f["removed"] in ranked for f in finalists)
    solved = [s["removed"] for s in read_json(out / "spectrum.json", "spectrum")["states"]]
    assert ranked[: len(solved)] == solved
    # What the report shows as the spectrum are all that were measured, each once.
    shown = RunFiles(out).spectrum
    assert [s.removed for s in shown.states] == ranked
    assert shown.searched == len(ranked) - len(solved) > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{len(solved)} states by " in page
    assert f"With them {shown.searched} that the search had measured." in page
    assert "You named them" not in page
    assert f"gave {len(ranked)} candidates: the lowest states" in page
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    # What one pass gives is measured beside it, and the report says what the rest has won.
    found = read_document(out / "candidates.json", CandidatesFile)
    quick = found.one_pass
    assert {s.method for s in quick.states} == {"angular-window", "block-influence"}
    for state in quick.states:
        assert state.kl == found.candidates[ranked.index(state.removed)].kl
        assert state.kl >= found.chosen.kl
    assert quick.passes == pytest.approx(1.0)
    assert quick.search_passes == energy.meta["search"]["passes"]
    said = sentence("one_pass_words", found)
    assert said in (out / "report.md").read_text(encoding="utf-8")
    assert said in (out / "model" / "README.md").read_text(encoding="utf-8")


def test_words_about_one_pass():
    def words(chosen, searched_for=1):
        prices = {"passes": 1.0, "search_passes": 128.0, "searched_for": searched_for}
        quick = OnePass.model_construct(states=[other, row], **prices)
        return sentence(
            "one_pass_words", CandidatesFile.model_construct(one_pass=quick, chosen=chosen)
        )

    measured = {"kl": 0.5, "kl_se": 0.01, "method": "angular-window", "removed": [4, 5]}
    measured["above_lowest_se"] = 0.08
    row = OnePassLoss.model_construct(**measured)
    other = row.model_copy(update={"kl": 0.8, "method": "block-influence", "removed": [1, 2]})
    chosen = row.model_copy(update={"removed": [2, 5], "kl": 0.4})
    said = words(chosen)
    assert "1 pass of the original (`angular-window`, without 4 5) has KL 0.5" in said
    assert "won 0.1000 ± 0.0800 of that, 20 %; this text does not separate the two." in said
    assert said.endswith("The search read its text 128 times.")
    same = words(row, 3)
    assert same.startswith("The search found no better state than `angular-window` gives after 1")
    assert same.endswith("read its text 128 times, for 3 removals.")
    worse = words(chosen.model_copy(update={"kl": 0.6}))
    assert worse.endswith("The choice was not made by KL.")
    assert sentence("one_pass_words", CandidatesFile.model_construct(chosen=chosen)) == ""


def test_a_range_is_one_search_and_a_ranking_each(inputs, tmp_path, capsys):
    out = tmp_path / "curve"
    words = [x for k, v in inputs.items() for x in (f"--{k.replace('_', '-')}", v) if k != "model"]
    assert call("run", inputs["model"], "--remove", "2..4", "--out", out, *words, "--json") == 0
    curve = json.loads(capsys.readouterr().out)["curve"]
    assert [len(row["removed"]) for row in curve] == [2, 3, 4]
    assert (out / "remove-4" / "report.html").is_file()
    assert not (out / "model").exists()
    search = Hamiltonian.load(out / "hamiltonian.safetensors").meta["search"]
    assert set(search["targets"]) == {"2", "3", "4"}
    assert search["passes"] <= 6 + 1
    # A number of the range can be cut afterwards, without measuring again.
    from isingcut.runs.cutting import make_model
    from isingcut.runs.folder import RunFolder
    from isingcut.runs.pipeline import session_of

    folder = RunFolder.open(out)
    config = folder.config.replace(remove="3", patch="none")
    model = make_model(session_of(folder, config), folder)
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 5


def test_effort_belongs_to_the_search(inputs, tmp_path):
    with pytest.raises(InputError, match="--effort is an option of"):
        isingcut.run(**{**inputs, "energy": "pairwise"}, remove="3", out=str(tmp_path / "no"))


def test_an_energy_near_a_range_is_solved_for_all_of_it(inputs, tmp_path, capsys):
    out = isingcut.energy(**inputs, remove="2..3", out=str(tmp_path / "near"))
    assert call("solve", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["removal"] for r in found["removals"]] == ["2", "3"]
    assert found["warnings"] == []
