"""The model card says what was cut, how, from whom, and what was measured."""

import pytest
import yaml

from isingcut.errors import StageFileError
from isingcut.files.documents import CardParts, HealingFile, PatchRecord
from isingcut.files.writing import read_json, write_json
from isingcut.report import card
from isingcut.report.run_files import RunFiles
from run_files import card_parts, change, healing, model_card, patch, run_content, write_run

N = 12


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "r", extras=False)
    write_json(folder / "run.json", "run", run_content("smollm2", "pairwise", N, 3, 0))
    return folder


def front_matter(card):
    _, head, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


def test_the_card_says_what_how_and_from_whom(folder):
    chosen = read_json(folder / "candidates.json", "candidates")["chosen"]
    card = model_card(folder, chosen["removed"])
    head = front_matter(card)
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["library_name"] == "transformers"
    assert "isingcut" in head["tags"]
    assert f"3 of 12 blocks removed: {', '.join(map(str, chosen['removed']))}" in card
    assert "arXiv:2602.00161" in card
    assert "patent" in card
    assert "The energy used here, `pairwise`, is not that paper's." in card
    figures = f"{chosen['kl']:.4f} ± {chosen['kl_se']:.4f} nats per token."
    assert f"{figures} As the choice was made on it" in card
    assert "GGUF" not in card


def test_the_card_does_not_claim_the_papers_energy_is_not_the_papers(folder):
    write_json(folder / "run.json", "run", run_content("smollm2", "empirical-fisher", N, 3, 0))
    assert "is that paper's empirical-Fisher estimate." in model_card(folder, [10, 11])


def test_the_card_of_a_local_model_tells_no_path(folder):
    run = run_content("/home/someone/models/mine", "pairwise", N, 3, 0)
    run["provenance"]["model"] |= {"sha256": "aa11", "gguf_sha256": "cc33"}
    write_json(folder / "run.json", "run", run)
    card = model_card(folder, [10, 11])
    assert "base_model" not in front_matter(card)
    assert "/home/someone" not in card
    assert card.count("mine") >= 2
    assert "unpacked to bfloat16" in card


def test_the_card_without_a_ranking_claims_no_measurement(folder):
    (folder / "candidates.json").unlink()
    card = model_card(folder, [1, 2])
    assert "no measured ranking behind this choice" in card
    assert "KL divergence" not in card


@pytest.mark.parametrize(
    ("held_out", "tuned"), [(None, False), ([0.5, 0.4], True), ([4, 5], False)]
)
def test_a_card_says_whether_a_patch_was_tuned(folder, held_out, tuned):
    layers = [{"block": 2, "layer": "mlp.up_proj"}]
    tuning = {"layers": layers, "steps": 9, "held_out_predictions": 99, "held_out_kl": held_out}
    found = PatchRecord.model_validate(patch(tuning=tuning if held_out else None))
    said = model_card(folder, [10, 11], patch=found)
    assert ("tuned on the loss for a few steps" in said) == tuned
    assert ("Nothing was trained by gradients" in said) != tuned


def test_a_healed_card_is_made_anew_from_the_parts_of_the_cut(folder):
    healed = HealingFile.model_validate(healing([{"step": 1, "tokens": 5, "loss": 1.0}], [10], N))
    cut, parts = model_card(folder, [10, 11]), card_parts(folder, [10, 11])
    found = card.healed_card(parts, cut, healed)
    assert front_matter(found) == front_matter(cut)
    assert "no weight was trained" in cut
    assert "no weight was trained" not in found
    assert "Before the cut model was accepted" in found
    assert "distilled from the original by low-rank adapters, merged. On 333 tokens" in found
    assert "from 0.9000 to 0.5000 nats per token, the perplexity from 29.00 to 24.00" in found
    assert found.index("## How") < found.index("## Healed") < found.index("## Source")
    assert "## Healed" not in cut
    # That of another tool keeps its text.
    other = card.healed_card(None, "# mine\n\nBe careful.\n\n\n", healed)
    assert other.startswith("# mine\n\nBe careful.\n\n## Healed\n")
    assert "from 0.9000 to 0.5000" in other


def test_parts_of_a_card_are_read_from_the_record_of_the_cut(folder):
    parts = card_parts(folder, [10, 11]).model_copy(update={"loads_with": "AutoModelForX"})
    file = folder / "model" / "isingcut.json"
    assert card.kept_parts(folder / "model") is None
    assert card.kept_parts(folder) is None
    assert RunFiles(folder).loads_with == "AutoModelForCausalLM"
    change(file, "removal", card=parts.content())
    assert card.kept_parts(folder / "model") == parts
    assert "from transformers import AutoModelForX\n" in card.model_card(parts)
    assert RunFiles(folder).loads_with == "AutoModelForX"
    change(file, "removal", card={**CardParts.content(parts), "rows": [["one"]]})
    with pytest.raises(StageFileError, match=r"isingcut\.json is damaged: card\.rows\.0"):
        card.kept_parts(folder / "model")
