"""The whole job on tiny models: every stage, resuming, refusing, and the command line's errors."""

import numpy as np
import pytest

import isingcut
import isingcut.runs.folder
import isingcut.runs.solving
from isingcut.files.store import Store
from isingcut.runs.folder import read_config
from isingcut.runs.pipeline import DEMO
from isingcut.runs.stages import Runner
from run_files import change
from shared import (
    OPTIONS,
    OutputExistsError,
    StageFileError,
    VerificationError,
    load_json,
    refuses,
    run_tiny,
    works,
)
from tiny import Hamiltonian

# Other tests measure speed and memory.
pytestmark = pytest.mark.usefixtures("no_speed")


def test_the_demo_searches_briefly_and_takes_no_gradients(llama, text, tmp_path):
    sizes = ("samples", "length", "rank_samples", "report_samples")
    options = {name: OPTIONS[name] for name in sizes}
    options |= {"model": llama, "calibration": text, "out": tmp_path / "run"}
    folder = isingcut.energy(DEMO.replace(remove="2", **options))
    (file,) = folder.glob("hamiltonian*.safetensors")
    search = Hamiltonian.load(file).meta["search"]
    assert search["passes"] <= search["budget_passes"] == 8.0


def test_every_stage_left_its_file(finished):
    made = """
        run.json calibration.safetensors hamiltonian.safetensors spectrum.json candidates.json
        hamiltonian.empirical-fisher.safetensors model evaluation.json
        report.md report.json report.html
    """
    assert {p.name for p in finished.iterdir()} == {*made.split()}
    assert load_json(finished / "run.json").complete is True
    ranked = load_json(finished / "candidates.json")
    assert set(ranked.fidelity_of_others) == {"empirical-fisher"}


def test_a_second_call_changes_nothing(finished, llama, text):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    run_tiny(llama, text, finished, remove=2, compare_energies="empirical-fisher")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_another_removal_reuses_the_energy(run, capsys):
    energy = (run / "hamiltonian.safetensors").stat().st_mtime_ns
    for verb in ("solve", "rank", "excise", "evaluate", "report"):
        works(verb, run, "--remove", 3)
    assert (run / "remove-3/model/config.json").is_file()
    assert (run / "remove-3/report.md").is_file()
    assert (run / "hamiltonian.safetensors").stat().st_mtime_ns == energy
    assert "proven" in capsys.readouterr().out


def test_a_ranking_keeps_the_blocks_that_its_spectrum_was_solved_with(
    run, capsys, refusal
):
    kept = load_json(run / "candidates.json").chosen.removed[0]
    works("solve", run, "--keep", kept, "--overwrite")
    for verb in ("excise", "evaluate"):
        assert "made before the spectrum changed" in refusal(verb, run)
    with refuses("type: isingcut rank .* --overwrite$", StageFileError):
        _ = isingcut.open_run(run).chosen
    capsys.readouterr()
    works("report", run)
    line = "candidates.json and model and evaluation.json: made before the spectrum"
    assert line in " ".join(capsys.readouterr().err.split())
    assert f"keep: was none, now {kept}" in refusal("rank", run)
    works("rank", run, "--overwrite")
    found = load_json(run / "candidates.json")
    assert not any(kept in row["removed"] for row in found.candidates + found.random)
    # The model is that of the earlier choice.
    assert "model was made before the choice changed; type: isingcut excise" in refusal(
        "evaluate", run
    )
    works("report", run)
    page = (run / "report.md").read_text()
    assert "model and evaluation.json: made before the choice changed" in page
    assert "You named them" not in page
    works("excise", run, "--overwrite")
    assert sorted(load_json(run / "model/isingcut.json").removed) == sorted(
        found.chosen.removed
    )
    config = isingcut.open_run(run).config
    isingcut.energy(config.replace(compare_energies="", effort="3", overwrite=True))
    capsys.readouterr()
    assert "spectrum.json was made before the energy changed" in refusal(
        "rank", run, "--overwrite"
    )


def test_another_dtype_makes_everything_after_the_text_again(llama, text, tmp_path):
    def made(**options):
        run_tiny(llama, text, tmp_path / "run", remove=2, patch="linear", **options)
        stages = load_json(tmp_path / "run/run.json").stages
        return {k: v.options.get("dtype") for k, v in stages.items()}

    assert set(made().values()) == {None, "float32"}
    found = made(dtype="bfloat16", overwrite=True)
    text_alone = ("calibration.safetensors", "spectrum.json")
    assert {k for k, dtype in found.items() if dtype != "bfloat16"} == {*text_alone}


def test_a_run_of_sublayers_takes_the_place_of_one_of_blocks(llama, text, run):
    for units, count in (("sublayers", 12), ("blocks", 6)):
        with refuses("units: was ", OutputExistsError):
            run_tiny(llama, text, run, remove=2, units=units)
        run_tiny(llama, text, run, remove=2, units=units, overwrite=True)
        assert len(load_json(run / "run.json").blocks.blocks) == count
        assert load_json(run / "model/isingcut.json").of == count


def test_what_quick_has_set_does_not_replace_what_is_typed_later(run):
    config = load_json(run / "run.json").config
    change(run / "run.json", config={**config, "quick": True, "random_states": 0})
    opened = isingcut.open_run(run).config
    assert opened.random_states == 0
    assert opened.replace(random_states=40).random_states == 40


# What the user gets wrong: one line, exit code 2, nothing written ------------------------


def test_a_checkpoint_that_fails_verification_is_not_kept(llama, text, tmp_path, fails):

    fails("isingcut.runs.cutting.verify", VerificationError("logits differ"))
    out = tmp_path / "run"
    with refuses("logits differ", VerificationError):
        run_tiny(llama, text, out, remove=1)
    assert not (out / "model").exists()
    assert load_json(out / "run.json").complete is False


def test_a_budget_decides_how_many_blocks_go(run):
    folder = Store.open(run)
    config = read_config(folder).replace(remove="", budget="params=30%")
    spectrum = isingcut.runs.solving.solve(Runner.of_files(folder), config)
    blocks = folder.run.blocks
    costs = np.array([b.parameters for b in blocks.blocks])
    assert (spectrum.states @ costs >= 0.3 * blocks.total_parameters).all()
    assert folder.target(config.removal) == run / "remove-params-30_"


def test_solving_far_from_where_an_energy_was_corrected_warns(
    llama, text, tmp_path, typed
):
    options = {**OPTIONS, "model": llama, "calibration": text}
    out = isingcut.energy(**options, remove=2, out=tmp_path / "near")
    assert "corrected near" not in typed("solve", out, "--remove", 2).err
    assert (
        "corrected near 2 and is less accurate for 3"
        in typed("solve", out, "--remove", 3).err
    )
