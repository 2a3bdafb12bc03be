"""The model card says what was cut, how, from whom, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from isingcut.errors import StageFileError
from isingcut.files.writing import write_json
from isingcut.report import card
from isingcut.report.read_run import read_run
from run_files import healing, model_card, record
from small_run import N, change, patch, run_json, write_small_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "r")


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


def healed() -> dict[str, Any]:
    return healing([{"step": 1, "tokens": 512, "loss": 1.0}], [10, 11], N)


def test_the_card_says_what_how_and_from_whom(folder: Path) -> None:
    card = model_card(folder, folder, [10, 11])
    head = front_matter(card)
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["library_name"] == "transformers"
    assert "isingcut" in head["tags"]
    assert "2 of 12 blocks removed: 10, 11" in card
    assert "arXiv:2602.00161" in card
    assert "patent" in card
    assert "The energy used here, `pairwise`, is not that paper's." in card
    assert "0.2750 ± 0.0625 nats per token. As the choice was made on it" in card
    assert "GGUF" not in card


def test_the_card_does_not_claim_the_papers_energy_is_not_the_papers(folder: Path) -> None:
    write_json(folder / "run.json", "run", run_json(energy="empirical-fisher"))
    assert "is that paper's empirical-Fisher estimate." in model_card(folder, folder, [10, 11])


def test_the_card_of_a_local_model_tells_no_path(folder: Path) -> None:
    run = run_json(model="/home/someone/models/mine")
    run["provenance"]["model"]["gguf_sha256"] = "cc33"
    write_json(folder / "run.json", "run", run)
    card = model_card(folder, folder, [10, 11])
    assert "base_model" not in front_matter(card)
    assert "/home/someone" not in card
    assert card.count("mine") >= 2
    assert "unpacked to bfloat16" in card


def test_the_card_without_a_ranking_claims_no_measurement(folder: Path) -> None:
    (folder / "candidates.json").unlink()
    card = model_card(folder, folder, [1, 2])
    assert "no measured ranking behind this choice" in card
    assert "KL divergence" not in card


def test_a_card_says_whether_a_patch_was_tuned(folder: Path) -> None:
    record(folder)
    parts = card.card_parts(folder, folder, [10, 11])
    plain = card.model_card({**parts, "patch": patch()})
    assert "Nothing was trained by gradients" in plain
    layers = [{"block": 2, "layer": "mlp.up_proj"}]
    tuning = {"layers": layers, "steps": 9, "held_out_predictions": 99, "held_out_kl": [0.5, 0.4]}
    tuned = card.model_card({**parts, "patch": patch(tuning=tuning)})
    assert "tuned on the loss for a few steps" in tuned
    assert "trained by gradients" not in tuned
    in_vain = patch(tuning={**tuning, "held_out_kl": [0.4, 0.5]})
    assert card.model_card({**parts, "patch": in_vain}).count("Nothing was trained") == 1


def test_a_healed_card_is_made_anew_from_the_parts_of_the_cut(folder: Path) -> None:
    cut = model_card(folder, folder, [10, 11])
    parts = json.loads(json.dumps(card.card_parts(folder, folder, [10, 11])))
    found = card.healed_card(parts, cut, healed())
    assert front_matter(found) == front_matter(cut)
    assert "no weight was trained" in cut
    assert "no weight was trained" not in found
    assert "Before the cut model was accepted" in found
    assert "distilled from the original by low-rank adapters, merged. On 333 tokens" in found
    assert "from 0.9000 to 0.5000 nats per token, the perplexity from 29.00 to 24.00" in found
    assert found.index("## How") < found.index("## Healed") < found.index("## Source")
    assert "## Healed" not in cut


def test_card_and_report_name_the_class_that_loads_the_cut(folder: Path) -> None:
    loads_with = "AutoModelForImageTextToText"
    record(folder)
    parts = card.card_parts(folder, folder, [10, 11], loads_with)
    assert f"from transformers import {loads_with}\n" in card.model_card(parts)
    assert read_run(folder).loads_with == "AutoModelForCausalLM"
    change(folder / "model" / "isingcut.json", "removal", card=parts)
    assert read_run(folder).loads_with == loads_with


def test_a_card_of_another_tool_keeps_its_text(folder: Path) -> None:
    found = card.healed_card(None, "# mine\n\nBe careful.\n\n\n", healed())
    assert found.startswith("# mine\n\nBe careful.\n\n## Healed\n")
    assert "from 0.9000 to 0.5000" in found


def test_parts_of_a_card_are_read_from_the_record_of_the_cut(folder: Path) -> None:
    record(folder)
    parts = card.card_parts(folder, folder, [10, 11])
    file = folder / "model" / "isingcut.json"
    assert card.kept_parts(folder / "model") is None
    assert card.kept_parts(folder) is None
    change(file, "removal", card=parts)
    assert card.kept_parts(folder / "model") == parts
    write_json(file, "removal", {"removed": [10], "of": N, "card": {**parts, "rows": [["one"]]}})
    with pytest.raises(StageFileError, match=r"isingcut\.json is damaged: card\.rows\.0"):
        card.kept_parts(folder / "model")
