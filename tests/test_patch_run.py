"""Patches, healing and benchmarks as parts of a run: proven, shown, left out in one line."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import isingcut
from healings import write_text
from isingcut.cli.main import app
from isingcut.data.healing_text import to_fit
from isingcut.evaluation.quality import quality
from isingcut.files.cuts import CutRecord
from isingcut.files.evaluations import EvaluationFile
from isingcut.files.runs import StageOptions
from isingcut.files.store import Store
from isingcut.formats.cutting import checkpoint
from isingcut.report.words import patch_warnings
from isingcut.runs import cutting, pipeline
from isingcut.runs.folder import read_config
from run_files import change
from shared import (
    OPTIONS,
    ArchitectureError,
    FitError,
    OutputExistsError,
    RunConfig,
    VerificationError,
    flags,
    load_json,
    module_fixture,
    parametrize,
    read_document,
    refuses,
    run_tiny,
    without_speed,
    works,
    write_jsonl,
    write_words,
)
from test_tasks import arc
from tiny import Calibration, Context, load_tiny, skip_blocks, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("no_speed")

REMOVED = [2, 3]


def job(model, text, out, **more):
    # The patch is fitted on all of the text.
    given = {"must_remove": "2,3", "energy": "fisher", "remove": 2}
    return run_tiny(model, text, out, **{**given, "patch_tokens": 65536, **more})


def patch_of(checkpoint):
    return load_json(checkpoint / "isingcut.json").patch


@module_fixture
def text(shared):
    """Fewer words than elsewhere, because patches are fitted on all of them."""
    return (
        shared.folder("few", lambda place: write_words(place / "text.txt", 450))
        / "text.txt"
    )


@module_fixture
def run(shared, llama, text):
    with without_speed():
        return shared.folder("patched", lambda place: job(llama, text, place))


@module_fixture
def exact(run, tmp_path_factory):
    """The exact cut of the same run."""
    out = tmp_path_factory.mktemp("exact") / "run"
    shutil.copytree(run, out)
    done = CliRunner().invoke(app, ["excise", str(out), "--patch", "none"])
    assert isinstance(done.exception, OutputExistsError)
    assert "patch: was None" not in str(done.exception)
    assert "repair: was tuned, now none" in str(done.exception)
    works("excise", out, "--patch", "none", "--overwrite")
    assert "patch" not in load_json(out / "model/isingcut.json")
    done = CliRunner().invoke(app, ["evaluate", str(out)])
    assert "made with other options (the checkpoint changed)" in str(done.exception)
    return out / "model"


def test_the_model_is_the_cut_with_other_weights_next_to_it(run, exact, llama):
    found = patch_of(run / "model")
    (cut,) = found.cuts
    tuning = found.tuning
    assert (cut.removed, cut.block, cut.layer) == ([2, 3], 1, "mlp.down_proj")
    assert cut.held_out_error_left < 1
    plain = load_file(exact / "model.safetensors")
    patched = load_file(run / "model/model.safetensors")
    assert plain.keys() == patched.keys()
    changed = [name for name in plain if not torch.equal(plain[name], patched[name])]
    assert min(tuning.held_out_kl) < tuning.held_out_kl[0]
    # The tuned layers are in blocks 1 and 4, which are now 1 and 2.
    new = {1: 1, 4: 2}
    tuned = {
        f"model.layers.{new[t['block']]}.{t['layer']}.weight" for t in tuning.layers
    }
    assert set(changed) == tuned >= {"model.layers.1.mlp.down_proj.weight"}
    assert len(tuned) == 2 * 7
    original = load_tiny(llama).model
    kept = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    ids = torch.arange(5, 21)[None]
    with torch.no_grad(), skip_blocks(original, REMOVED):
        torch.testing.assert_close(
            kept(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_patch_and_cut_are_judged_on_text_of_no_fit(run, exact, llama):
    found = load_json(run / "evaluation.json")
    assert found.last == "patched"
    assert found.kl < found.cut.kl
    # The values of the exact cut are those of its checkpoint.
    calibration = Calibration.load(run / "calibration.safetensors")
    models = (load_tiny(m).model for m in (llama, exact))
    scores = quality(*models, calibration.splits["report"])
    assert found.cut.kl == pytest.approx(scores.kl, rel=1e-4)
    for name in ("perplexity", "perplexity_se"):
        assert found.cut[name] == pytest.approx(getattr(scores.after, name), rel=1e-3)
    fitted = patch_of(run / "model")["text"]
    assert fitted["searched"] == calibration.splits["energy"].samples
    assert fitted["samples"] > fitted["searched"]
    assert fitted["short"] == "the source has no more"


def heads(shown):
    """Return the head of a table on the terminal."""
    return shown.out.splitlines()[2].replace("┃", " ").split()


def test_report_card_and_terminal_show_all_three(run, typed):
    markdown = (run / "report.md").read_text()
    assert "| | original | cut | patched | change |" in markdown
    assert "The patch wins back" in markdown
    assert "| 2 to 3 | block 1, `mlp.down_proj` |" in markdown
    page = (run / "report.html").read_text()
    assert 'id="patched"' in page
    assert 'class="meter patched"' in page
    card = (run / "model/README.md").read_text()
    assert "skipped and the same layers patched, on text." in card
    assert "none of them in the splits that rank and report" in card
    assert heads(typed("evaluate", run)) == ["original", "cut", "patched", "change"]


def test_blocks_by_hand_are_patched_as_well(run, tmp_path, answer):
    out = shutil.copytree(run, tmp_path / "run")
    made = Path(answer("excise", out, "--blocks", "1,4").checkpoint)
    assert made.parent.name == "remove-2-blocks-1-4"
    assert [cut["removed"] for cut in patch_of(made)["cuts"]] == [[1, 1], [4, 4]]
    plain = answer("excise", out, "--blocks", "1,5", "--patch", "none").checkpoint
    assert "patch" not in load_json(Path(plain) / "isingcut.json")


def off_by_one(write, whole, places, **more):
    return write(whole, {i + (i == 1): new for i, new in places.items()}, **more)


def in_another_block(write, folder, tensors, replaced, *more):
    moved = {n.replace("layers.1.", "layers.4."): t for n, t in replaced.items()}
    write(folder, tensors, moved, *more)


def stale(cut, config, *given, **more):
    """The kinds of attention are those of the first blocks."""
    kinds = checkpoint.cuts.read_decoder(config)["layer_types"][:-1]
    return cut(config, *given, **more) | {"layer_types": kinds}


@parametrize(
    "owner, name, wrong",
    [
        (checkpoint, "_list_tensors", off_by_one),
        (checkpoint, "write_weights", in_another_block),
        (checkpoint.cuts, "cut_config", stale),
    ],
)
def test_the_one_proof_finds_what_is_written_wrong(
    owner, name, wrong, shared, text, tmp_path, monkeypatch
):
    model = shared.checkpoint("gemma2", sliding_window=6)
    monkeypatch.setattr(owner, name, partial(wrong, getattr(owner, name)))
    with refuses("differs from the original without blocks", VerificationError):
        job(model, text, tmp_path, must_remove=2, remove=1, patch="linear")


def test_a_state_that_cannot_be_cut_is_refused_before_a_fit(run, tmp_path, stub):
    folder = Store.open(Path(shutil.copytree(run, tmp_path / "run")))
    stub(cutting, "make_patches", None)
    runner = pipeline.open_again(folder, read_config(folder))
    with refuses("all 6 blocks would be removed", ArchitectureError):
        cutting.make_model(runner, read_config(folder), range(6))


def test_a_run_holds_its_checkpoint_once(llama, text, tmp_path, spy):
    def held(*_):
        files = tmp_path.rglob("model*.safetensors")
        return sum(file.stat().st_size for file in files)

    sizes = [spy(checkpoint, "write_checkpoint", held), spy(os, "replace", held)]
    out = job(llama, text, tmp_path / "run", patch="linear")
    assert patch_of(out / "model").cuts
    size = (out / "model/model.safetensors").stat().st_size
    assert max(map(max, sizes)) <= 1.05 * size


def test_a_patch_is_fitted_with_the_recorded_micro_batch(run, tmp_path, monkeypatch):
    out = Path(shutil.copytree(run, tmp_path / "run"))
    sizes = []
    made = load_json(out / "run.json")
    # As a run records it that chose the micro-batch for its device.
    config = {**made.config, "batch_tokens": None}
    computed = {"cpu": {"requested": None, "batch_tokens": 48}}
    provenance = {**made.provenance, "computed": computed}
    change(out / "run.json", config=config, provenance=provenance)

    def make_patches(job, *given):
        sizes.append(job.config.batch_tokens)
        raise FitError("noted")

    monkeypatch.setattr(cutting, "make_patches", make_patches)
    works("excise", out, "--blocks", "1,4")
    assert sizes == [48]


def test_a_state_is_found_by_its_blocks_whatever_removed_it(run):
    folder = Store.open(run)
    made = folder.record(run / "model")
    other = made.model_copy(update={"options": StageOptions(removed=[0, 4])})
    folder.run.stages["remove-params-20_/model"] = other
    place = cutting.product(folder, read_config(folder), [4, 0])
    assert place == run / "remove-params-20_/model"
    with refuses("has no checkpoint without the blocks 0,5"):
        cutting.product(folder, read_config(folder), [0, 5])


def test_where_no_layer_can_take_a_map_one_line_says_why(llama, text, tmp_path, answer):
    out = tmp_path / "run"
    given = {**OPTIONS, "energy": "fisher", "remove": 1, "must_remove": 0}
    found = answer("run", llama, *flags({**given, "out": out, "calibration": text}))
    (warning,) = (w for w in found.warnings if "patched" in w)
    assert warning.startswith("not patched: block 0 is removed")
    assert found.evaluation.last == "cut"
    evaluation = read_document(out / "evaluation.json", EvaluationFile)
    assert patch_warnings(evaluation) == [warning]
    card = (out / "model/README.md").read_text()
    assert warning[1:] in card
    assert warning in (out / "report.md").read_text()
    assert isingcut.open_run(out).warnings[-1] == warning
    assert "no weight was trained" in card


def test_a_streamed_model_is_patched_block_by_block(llama, text, tmp_path):
    out = job(llama, text, tmp_path / "run", stream="on")
    assert "streamed from disk" in patch_of(out / "model").tuning.left_out
    fitted = job(llama, text, tmp_path / "fitted", patch="linear")
    assert patch_of(fitted / "model").tuning is None
    streamed, whole = (load_json(p / "evaluation.json") for p in (out, fitted))
    assert streamed.last == "patched"
    for name in ("kl", "kl_se"):
        assert streamed[name] == pytest.approx(whole[name], rel=1e-2)
        assert streamed.cut[name] == pytest.approx(whole.cut[name], rel=1e-3)


def test_too_little_text_for_the_fit_is_reported(run, tmp_path, monkeypatch, answer):
    def one_sample(*given):
        tokens, record = to_fit(*given)
        return tokens.select([0]), record

    monkeypatch.setattr("isingcut.runs.cutting.to_fit", one_sample)
    out = shutil.copytree(run, tmp_path / "run")
    made = Path(answer("excise", out, "--blocks", "1,4").checkpoint)
    (warning,) = patch_warnings(read_document(made / "isingcut.json", CutRecord))
    assert "at least two samples" in warning


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_texts_that_are_gone_leave_those_of_the_energy(llama, tmp_path):
    words = write_words(tmp_path / "t.txt").read_text().split()
    texts = [" ".join(words[i : i + 30]) for i in range(0, len(words), 30)]
    made = {**OPTIONS, "energy": "fisher", "samples": 6, "out": tmp_path / "run"}
    isingcut.prune(str(llama), 2, calibration=texts, must_remove="2,3", **made)
    fitted = patch_of(isingcut.open_run(tmp_path / "run").save(tmp_path / "saved")).text
    assert fitted.samples == fitted.searched == 6
    assert fitted.short.startswith("the source was changed or cannot be read; restore")


@module_fixture
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    tiny_checkpoint("llama", place / "model")
    write_text(place / "text.jsonl", 200)
    write_jsonl(place / "data/arc_easy/test.jsonl", [arc(i)[1] for i in range(6)])
    return place


TRAINER = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.0005}


def config(folder, name, **changes):
    given = {"energy": "fisher", "remove": "2", "length": 32, "keep": "0"}
    given |= {"model": folder / "model", "calibration": folder / "text.jsonl"}
    healing = {"length": 32, "report-samples": 2, "trainer": TRAINER}
    given |= {"out": folder / name, "device": "cpu", "healing": healing}
    return RunConfig(**{**OPTIONS, **given}).replace(**changes)


@module_fixture
def healed_run(folder):
    with without_speed():
        yield pipeline.run(config(folder, "run", heal=True))


def test_a_run_heals_what_the_ranking_chose(healed_run):
    chosen = load_json(healed_run / "candidates.json").chosen
    cut = load_json(healed_run / "model/isingcut.json")
    assert cut.removed == chosen.removed
    assert cut.patch.cuts
    found = load_json(healed_run / "healed/healing.json")
    assert found.removed == cut.removed
    # The cut was patched before.
    assert (found.start, found.options.patch) == ("patched", "none")
    assert len(found.steps) == 3
    assert found.after.kl < found.before.kl
    # The final model is the healed one.
    evaluation = load_json(healed_run / "evaluation.json")
    count = load_tiny(healed_run / "healed").model.num_parameters()
    assert evaluation.after.parameters == count
    assert evaluation.last == "healed"
    assert evaluation.cut.kl >= evaluation.patched.kl >= evaluation.kl
    assert not (healed_run / "cut").exists()
    card = (healed_run / "healed/README.md").read_text()
    assert card.index("## Patched") < card.index("## Healed")
    report = (healed_run / "report.md").read_text()
    assert "| | original | cut | patched | healed | change |" in report
    assert not [p.name for p in healed_run.iterdir() if p.name.startswith(".")]


def test_a_healed_model_of_an_earlier_cut_is_not_the_runs(folder, healed_run, tmp_path):
    out = Path(shutil.copytree(healed_run, tmp_path / "run"))
    pipeline.run(
        config(folder, "run", remove="1", patch="none", out=out, overwrite=True)
    )
    found = load_json(out / "evaluation.json")
    assert (found.last, found.after.blocks) == ("cut", 5)
    assert "| | original | cut | change |" in (out / "report.md").read_text(
        encoding="utf-8"
    )


def test_benchmarks_of_a_run_from_the_command_line(folder, healed_run, answer):
    given = {"tasks": "arc_easy", "data": folder / "data"}
    (row,) = answer("evaluate", healed_run, *flags(given)).benchmarks.rows
    assert (row.task, row.n) == ("arc_easy", 6)
    assert load_json(healed_run / "benchmarks.json").rows == [row]
    assert {"metric", "original", "original_se", "cut", "cut_se"} <= set(row)


def test_a_checkpoint_against_its_original(
    folder, healed_run, tmp_path, typed, refusal
):
    given = {"original": folder / "model", "tasks": "instructions", "device": "cpu"}
    given |= {"data": folder / "data", "out": tmp_path / "scores.json", "questions": 6}
    error = refusal("evaluate", healed_run / "healed", *flags(given))
    assert "generates up to 256 tokens, but the model has 128 positions" in error
    given["tasks"] = "arc_easy,needle"
    said = typed("evaluate", healed_run / "healed", *flags(given)).out
    assert "acc, n = 6, p = " in said
    found = load_json(tmp_path / "scores.json")
    assert [row.n for row in found.rows] == [6, 6]
    # What the scores depend on: the questions, the seed of the examples, and the chat template.
    assert len({row.questions_sha for row in found.rows} - {""}) == 2
    assert (found.seed, bool(found.template_sha)) == (1234, True)


def test_a_checkpoint_given_as_a_run_names_the_command_that_compares(
    healed_run, refusal
):
    said = refusal("evaluate", healed_run / "healed", "--tasks", "arc_easy")
    assert "add --original MODEL" in said


def test_heal_from_the_command_line(folder, healed_run, tmp_path, typed):
    given = {"teacher": folder / "model", "text": folder / "text.jsonl", "length": 32}
    given |= {"report_samples": 2, "samples": 4, "train": "100 tokens"}
    given |= {"device": "cpu", "dtype": "float32", "out": tmp_path / "healed"}
    shown = typed("heal", healed_run / "model", *flags(given))
    assert heads(shown) == ["original", "patched", "healed", "change"]
    assert (tmp_path / "healed/healing.json").exists()


def test_a_range_is_refused_before_it_is_measured(folder):
    with refuses("range of removals"):
        pipeline.run(config(folder, "never", heal=True, remove="1..2"))
    assert not (folder / "never").exists()


def test_a_streamed_model_is_not_healed(folder):
    wanted = config(folder, "never", heal=True, stream="on")
    with refuses("cannot be healed in the run"):
        cutting.check_healing(Context(wanted), wanted)
