"""Layers for multi-token prediction through a whole run: kept, judged, healed, dropped."""

from types import SimpleNamespace

import pytest

import isingcut
from healings import options, write_text
from isingcut.evaluation.quality import draft_acceptance
from isingcut.files.evaluations import EvaluationFile
from isingcut.files.results import read_json
from isingcut.healing.heal import heal
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.fit import count_mtp_layers, is_mtp
from isingcut.models.safetensors_files import read_checkpoint
from isingcut.report.words import patch_warnings
from isingcut.runs.evaluating import _add_drafts
from isingcut.testing.tiny import tiny_checkpoint, tiny_model
from shared import OPTIONS
from sweep.mtp import add_mtp_layers
from tiny import random_tokens

pytestmark = pytest.mark.usefixtures("no_speed")
OF_MTP = "model.layers.4."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("mtp") / "teacher")
    add_mtp_layers(tiny_model("deepseek_v3"), folder)
    write_text(folder.parent / "text.jsonl", 80)
    return folder


def run(source, text, out, **more):
    given = {"model": str(source), "calibration": str(text), "out": str(out), "remove": 2}
    return isingcut.run(**{**OPTIONS, **given, **more})


def bytes_of(folder, start):
    """Return a block's bytes except experts, which transformers stores singly and merges again."""
    stored = {n: t for n, t in read_checkpoint(folder).items() if "experts" not in n}
    return {n.removeprefix(start): t.data() for n, t in stored.items() if n.startswith(start)}


def test_a_run_keeps_mtp_layers_and_judges_their_drafts(source, text, tmp_path):
    target = run(source, text, tmp_path / "run", patch="linear")
    assert count_mtp_layers(target / "model") == 2
    assert bytes_of(target / "model", OF_MTP) == bytes_of(source, "model.layers.6.")
    found = read_json(target / "evaluation.json", "evaluation")
    assert all(0 <= found[m]["draft_acceptance"] <= 1 for m in ("before", "cut", "after"))
    kept = "ayers for multi-token prediction (MTP), which draft further tokens: 2, kept as they are"
    assert kept in (target / "model" / "README.md").read_text(encoding="utf-8")
    assert "MTP drafts accepted" in (target / "report.md").read_text(encoding="utf-8")


def test_a_draft_is_accepted_where_the_model_predicts_it():
    model, tokens = tiny_model("llama"), random_tokens().select([0])
    own = model(tokens.batches(1024)[0].input_ids).logits[:, 1:]
    mtp = SimpleNamespace(forward_layer=lambda *_, **__: own, _project_to_logits=lambda x: x)
    assert draft_acceptance(model, mtp, tokens, 1024)[0] == 1


def test_drafts_that_transformers_cannot_make_are_reported_as_missing(source):
    llama = SimpleNamespace(model=tiny_model("llama"), folder=source)
    session = SimpleNamespace(loaded=llama, source=source, batch_tokens=9)
    found = EvaluationFile.model_construct()
    _add_drafts(session, found, llama, None)
    why = "the drafts of the MTP layers were not measured: transformers cannot run those of llama"
    assert patch_warnings(found) == [why]


def test_a_healing_keeps_mtp_layers(source, tmp_path):
    cut = source.parent / "student"
    excise(source, [2, 3], cut)
    healed = heal(options(source.parent, tmp_path / "healed", {"max_steps": 1}))
    assert bytes_of(healed, OF_MTP) == bytes_of(source, "model.layers.6.")


def test_dropped_mtp_layers_are_gone_everywhere_and_reported(source, text, tmp_path):
    target = run(source, text, tmp_path / "run", patch="none", drop_mtp=True)
    assert count_mtp_layers(target / "model") == 0
    assert not bytes_of(target / "model", OF_MTP)
    four = {"num_hidden_layers": 4, "num_nextn_predict_layers": 2}
    assert [is_mtp(f"model.layers.{i}.x", four) for i in range(3, 7)] == [False, True, True, False]
    assert "draft_acceptance" not in read_json(target / "evaluation.json", "evaluation")["after"]
    said = "draft further tokens: 2, left out (--drop-mtp)"
    for file in ("report.md", "model/README.md"):
        assert said in (target / file).read_text(encoding="utf-8")
