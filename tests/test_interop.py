"""A checkpoint as `hf upload` takes it: with the figures, and without anything private."""

import contextlib

import pytest
from huggingface_hub import ModelCard

from healings import TRAINING, write_text
from isingcut.files.ownership import MARKER, foreign_in
from isingcut.files.writing import atomic_file
from shared import load_json, module_fixture, parametrize, run_tiny, save_json, works
from tiny import tiny_checkpoint

WHO = "alice.liddell"


@module_fixture
def run(tmp_path_factory):
    """A healed run in the folder of a user, whose name other programs left in the model, too."""
    home = tmp_path_factory.mktemp("home") / WHO / "private"
    model = tiny_checkpoint("llama", home / "model")
    place = f"{home}/model"
    left = {
        "config.json": {"_name_or_path": place, "vision": {"weights_dir": place}},
        "tokenizer_config.json": {"name_or_path": place, "vocab_file": "vocab.json"},
        "preprocessor_config.json": {"image_path": [place], "pad_token": "/pad"},
    }
    for name, keys in left.items():
        file = model / name
        save_json(file, {**(load_json(file) if file.exists() else {}), **keys})
    text = write_text(home / "diary.jsonl", 200)
    healing = {"method": "full", "length": 16, "report_samples": 2, "trainer": TRAINING}
    return run_tiny(model, text, home / "run", remove=2, heal=True, healing=healing)


@parametrize("name", ["model", "healed"])
def test_no_file_of_a_checkpoint_has_anything_private(run, name):
    files = [p for p in (run / name).rglob("*") if p.is_file()]
    for file in files:
        content = file.read_bytes()
        for private in (WHO, str(run.parents[2]), "command_line", "private/"):
            assert private.encode() not in content, file
    assert WHO in load_json(run / "run.json").config.calibration
    assert load_json(run / name / "tokenizer_config.json").vocab_file == "vocab.json"
    kept = load_json(run / name / "preprocessor_config.json")
    assert kept == {"image_path": ["model"], "pad_token": "/pad"}
    assert load_json(run / name / "isingcut.json").model.name == "model"


def test_the_card_has_the_figures_for_the_hub(run):
    card = run / "healed/README.md"
    shown = ModelCard.load(card).data
    scored = load_json(run / "evaluation.json").after
    assert shown.model_name == "run"
    first = shown.eval_results[0]
    assert first.metric_type == "perplexity"
    assert first.metric_value == pytest.approx(scored.perplexity)
    # The figures do not make the card the user's, which --overwrite would not replace.
    assert foreign_in(run / "healed") is None
    written = card.read_text()
    # What a user writes stays, and the figures are replaced.
    edited = written.replace("tags:\n", "license: mit\ntags:\n", 1)
    card.write_text(edited)
    (run / "evaluation.json").unlink()
    works("evaluate", run)
    assert card.read_text() == edited
    assert "README.md" in foreign_in(run / "healed")


def test_a_kill_between_the_marker_and_the_card_leaves_the_card_ours(
    llama, text, tmp_path, monkeypatch
):
    @contextlib.contextmanager
    def stop(path):
        with atomic_file(path) as temporary:
            yield temporary
        if path.name == MARKER:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("isingcut.runs.evaluating.atomic_file", stop)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(llama, text, out, remove=2)
    assert "README.md" in foreign_in(out / "model")
    run_tiny(llama, text, out, remove=2)
    assert ModelCard.load(out / "model/README.md").data.eval_results
    assert foreign_in(out / "model") is None
