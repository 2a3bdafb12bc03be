"""The report says what the files say, and says so when a file is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from isingcut.errors import StageFileError
from isingcut.files.writing import read_json, write_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig
from isingcut.report import card, words
from isingcut.report.fidelity import fidelity_warnings, ranking_warnings
from isingcut.report.read_run import read_run
from isingcut.report.render import fenced
from isingcut.report.words import spectrum_map
from run_files import healing, model_card, record, write_report

N = 12
STATES = [[2, 3], [3, 4], [10, 11]]


def correlation(value: float | None, low: float | None, n: int = 33) -> dict[str, Any]:
    return {
        "spearman": value,
        "spearman_low": low,
        "spearman_high": None if value is None else min(1.0, value + 0.05),
        "kendall": value,
        "kendall_low": low,
        "kendall_high": value,
        "n": n,
    }


def measured(removed: list[int], k: int) -> dict[str, Any]:
    return {
        "removed": removed,
        "energy": 0.5 + k / 8,
        "kl": 0.4 - k / 16,
        "kl_se": 0.0625,
        "nll": 3.0,
        "nll_se": 0.1,
    }


def run_json(model: str = "smollm2", energy: str = "pairwise") -> dict[str, Any]:
    config = {f: getattr(RunConfig(), f) for f in ("seed", "calibration", "linear", "keep")}
    made = {"fingerprint": "0", "options": {"remove": "5"}, "done": True}
    stages = {
        "calibration.safetensors": {**made, "stage": "calibration", "seconds": 1.25},
        "spectrum.json": {**made, "stage": "solve", "seconds": 0.5},
        "benchmarks.json": {**made, "stage": "benchmarks", "done": False},
        "remove-5/spectrum.json": {**made, "stage": "solve", "seconds": 77.0},
    }
    block = {"kind": "attention+mlp", "parameters": 10**6, "bytes": 2 * 10**6}
    return {
        "config": {"model": model, "remove": "2", "energy": energy, **config},
        "stages": stages,
        "blocks": {
            "path": "model.layers",
            "blocks": [{"index": i, **block} for i in range(N)],
            "total_parameters": N * 10**6,
            "total_bytes": 2 * N * 10**6,
            "legality": [],
        },
        "provenance": {
            "isingcut": "0.1.0",
            "python": "3.11.0",
            "torch": "2.9.0",
            "transformers": "5.10.0",
            "platform": "Linux",
            "cpu": "a CPU | with a bar",
            "command_line": "isingcut run smollm2 --remove 2 --out r",
            "created": "2026-01-01T00:00:00Z",
            "model": {"name": model, "sha256": "aa11", "weight_bytes": 8},
            "calibration": {
                "source": "wiki",
                "sha256": "bb22",
                "splits": {"energy": {"samples": 4, "tokens": 40}},
            },
        },
        "complete": True,
    }


def side(perplexity: float, blocks: int) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "perplexity_se": 0.25,
        "nll": 3.0,
        "nll_se": 0.01,
        "parameters": blocks * 10**6,
        "bytes": blocks * 2 * 10**6,
        "blocks": blocks,
        "prefill_tokens_per_second": 100.0,
        "decode_tokens_per_second": 10.0,
        "peak_memory_bytes": 5 * 10**8,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, removing blocks 10 and 11: the third state of its spectrum."""
    path = tmp_path / "r"
    path.mkdir()
    write_json(path / "run.json", "run", run_json())
    h = Hamiltonian(
        np.zeros(N),
        np.zeros((N, N)),
        0.0,
        unit="nats/token",
        meta={"energy": "pairwise", "loss": "KL(original || cut)", "samples": 4, "tokens": 40},
    )
    h.save(path / "hamiltonian.safetensors")
    write_json(
        path / "spectrum.json",
        "spectrum",
        {
            "n": N,
            "unit": "nats/token",
            "solver": "exhaustive",
            "seconds": 0.5,
            "proven": True,
            "lower_bound": 0.5,
            "info": {},
            "states": [
                {"rank": k, "energy": 0.5 + k / 8, "removed": s} for k, s in enumerate(STATES)
            ],
        },
    )
    rows = [measured(s, k) for k, s in enumerate(STATES)]
    write_json(
        path / "candidates.json",
        "candidates",
        {
            "remove": "2",
            "unit": "nats/token",
            "energy_unit": "nats/token",
            "samples": 3,
            "tokens": 333,
            "candidates": rows,
            "random": [measured([0, 1], 5)] * 30,
            "fidelity": {"kl": correlation(0.93, 0.81), "nll": correlation(0.9, 0.7)},
            "fidelity_of_others": {"empirical-fisher": {"kl": correlation(-0.12, -0.4)}},
            "chosen": {**rows[2], "position": 2, "why": "lowest measured KL"},
            "original": {"nll": 2.5},
            "proven": True,
            "solver": "exhaustive",
        },
    )
    (path / "model").mkdir()
    write_json(
        path / "model" / "isingcut.json", "removal", {"removed": [10, 11], "of": N, "model": {}}
    )
    write_json(
        path / "evaluation.json",
        "evaluation",
        {
            "samples": 5,
            "tokens": 555,
            "before": side(20.0, 12),
            "after": side(25.0, 10),
            "kl": 0.3125,
            "kl_se": 0.0125,
            "generation": {"prompt": "Why?", "before": "Because.", "after": "So ``` so."},
            "device": "cpu",
            "dtype": "float32",
        },
    )
    return path


def page_of(folder: Path, target: Path | None = None) -> str:
    write_report(folder, target)
    return ((target or folder) / "report.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def change(path: Path, kind: str, **values: Any) -> None:
    document = read_json(path, kind)
    write_json(path, kind, {**document, **values})


def test_a_finished_run_is_told_from_its_files(folder: Path) -> None:
    page = page_of(folder)
    assert page.startswith("# smollm2 without 2 of its 12 blocks\n")
    assert "Blocks 10 and 11 of 12 (numbered from 0) are removed." in page
    assert "state 2 of that spectrum (0 is the lowest), energy 0.75 nats/token" in page
    assert "lowest measured KL (KL 0.2750 ± 0.0625 nats per token)" in page
    table = section(page, "Before and after")
    assert "| perplexity | 20.00 ± 0.25 | 25.00 ± 0.25 | +25.0 % |" in table
    assert "| KL to the original, nats/token | 0 | 0.3125 ± 0.0125 |  |" in table
    assert "| parameters, million | 12.00 | 10.00 | -16.7 % |" in table
    assert "| weights on disk, MB | 24.0 | 20.0 | -16.7 % |" in table
    assert "555 tokens in 5 samples" in table
    ranks = section(page, "How well the energy ranks")
    assert "| `pairwise` | KL | candidates and random | 0.93 (0.81 to 0.98)" in ranks
    assert "| `empirical-fisher` | KL | candidates and random | -0.12 (-0.40 to -0.07)" in ranks
    assert "Warning" not in ranks
    assert 'from_pretrained("r/model")' in section(page, "Loading the model")
    assert "Not run" not in page


def test_the_map_has_one_row_per_state_and_one_column_per_block(folder: Path) -> None:
    page = page_of(folder)
    lines = section(page, "Spectrum").split("```text\n")[1].split("\n```")[0].splitlines()
    assert len(lines) == 2 + len(STATES)
    assert lines[1].endswith("012345678901")
    assert lines[0].endswith("0         1")
    for line, removed in zip(lines[2:], STATES, strict=True):
        blocks = line[-N:]
        assert [i for i, c in enumerate(blocks) if c == "·"] == removed
        assert blocks.count("#") == N - 2
        # Columns stand under their numbers.
        assert len(line) == len(lines[1])
    assert [line.lstrip().startswith("*") for line in lines[2:]] == [False, False, True]
    assert "0.2750 ± 0.0625" in lines[4]


def test_provenance_and_timings_are_those_of_this_removal(folder: Path) -> None:
    part = section(page_of(folder), "Reproducing this")
    for fact in ("`aa11`", "`bb22`", "seed=0", "isingcut run smollm2 --remove 2", "2.9.0"):
        assert fact in part
    assert "a CPU \\| with a bar" in part
    assert "| calibration | `calibration.safetensors` | 1.2 |" in part
    assert "| benchmarks | `benchmarks.json` | not finished |" in part
    assert "77.0" not in part


def test_the_json_holds_the_same_facts(folder: Path) -> None:
    write_report(folder)
    data = read_json(folder / "report.json", "report")
    assert data["removed"] == [10, 11]
    assert data["not_run"] == []
    assert data["evaluation"]["kl"] == 0.3125
    assert data["fidelity"]["pairwise"]["kl"]["spearman"] == 0.93
    assert data["provenance"]["model"]["sha256"] == "aa11"
    assert len(data["spectrum"]["states"]) == 3


@pytest.mark.parametrize(
    ("missing", "title", "stage"),
    [
        ("evaluation.json", "Before and after", "evaluate"),
        ("candidates.json", "How well the energy ranks", "rank"),
        ("spectrum.json", "Spectrum", "solve"),
        ("model/isingcut.json", "Loading the model", "excise"),
    ],
)
def test_an_absent_stage_is_said_to_be_not_run(
    folder: Path, missing: str, title: str, stage: str
) -> None:
    (folder / missing).unlink()
    page = page_of(folder)
    part = section(page, title)
    assert part.strip().startswith("Not run")
    assert f"`isingcut {stage} r`" in part
    assert page.count("Not run") == 1
    assert read_json(folder / "report.json", "report")["not_run"] == [stage]


def test_an_energy_alone_makes_a_report_without_claims(folder: Path) -> None:
    for name in ("evaluation.json", "candidates.json", "spectrum.json", "model/isingcut.json"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "No blocks have been chosen yet." in page
    assert page.count("Not run") == 4
    assert "perplexity" not in page


def test_another_removal_has_its_own_report_and_commands(folder: Path) -> None:
    (folder / "remove-5").mkdir()
    page = page_of(folder, folder / "remove-5")
    assert "`isingcut rank r --remove 5`" in page
    assert "| solve | `remove-5/spectrum.json` | 77.0 |" in page
    assert "| calibration | `calibration.safetensors` | 1.2 |" in page
    assert "| solve | `spectrum.json` |" not in page
    assert not (folder / "report.md").exists()


def test_blocks_named_by_hand_are_not_given_a_reason(folder: Path) -> None:
    change(folder / "model" / "isingcut.json", "removal", removed=[1, 2])
    page = page_of(folder)
    assert "Blocks 1 and 2 of 12 (numbered from 0) are removed. They were named by hand" in page
    assert "lowest measured KL" not in page
    assert "`*` marks" not in page


def test_figures_that_were_not_measured_are_not_invented(folder: Path) -> None:
    before, after = side(20.0, 12), side(25.0, 10)
    before["perplexity_se"] = after["perplexity_se"] = None
    del before["peak_memory_bytes"]
    change(folder / "evaluation.json", "evaluation", before=before, after=after, kl_se=None)
    table = section(page_of(folder), "Before and after")
    assert "| perplexity | 20.00 | 25.00 | +25.0 % |" in table
    assert "| peak memory, MB | not measured | not measured |  |" in table


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (correlation(0.95, 0.9), []),
        (correlation(0.2, -0.1), ["ranked the measured states poorly (Spearman 0.20"]),
        (correlation(-0.6, -0.8), ["poorly (Spearman -0.60"]),
        (correlation(0.8, 0.3), ["reaches down to 0.30"]),
        (correlation(None, None), ["undefined"]),
        (correlation(0.95, 0.9, n=12), ["Only 12 states"]),
    ],
)
def test_a_poor_or_unknown_fidelity_is_a_plain_warning(
    folder: Path, found: dict[str, Any], words: list[str]
) -> None:
    said = fidelity_warnings("pairwise", found)
    assert len(said) == len(words)
    assert all(w in s for w, s in zip(words, said, strict=True))
    change(folder / "candidates.json", "candidates", fidelity={"kl": found})
    page = page_of(folder)
    assert page.count("**Warning.**") == len(words)
    assert ("undefined | undefined" in page) == (found["spearman"] is None)


def test_an_energy_that_prices_the_choice_far_too_low_is_a_warning() -> None:
    chosen = {"energy": 0.6, "kl": 1.5}
    found = {"fidelity": {"kl": correlation(0.95, 0.9)}, "chosen": chosen}
    (said,) = ranking_warnings("pairwise", {**found, "energy_unit": "nats/token"})
    assert "0.6 nats per token, measured were 1.5" in said
    assert ranking_warnings("empirical-fisher", {**found, "energy_unit": "arbitrary"}) == []
    assert "use --energy auto" in said
    (said,) = ranking_warnings("refined", {**found, "energy_unit": "nats/token"})
    assert "--effort" in said
    assert "auto" not in said
    chosen["kl"] = 1.1
    assert ranking_warnings("pairwise", {**found, "energy_unit": "nats/token"}) == []


def test_generated_text_cannot_break_out_of_its_block(folder: Path) -> None:
    assert fenced("a ``` b").startswith("````text\n")
    assert "````text\nSo ``` so.\n````" in page_of(folder)


def test_a_wide_map_numbers_its_tens() -> None:
    spectrum = {"n": 23, "states": [{"rank": 0, "energy": 1.0, "removed": [22]}]}
    lines = spectrum_map(spectrum, None, None)
    assert lines[0].endswith("0         1         2")
    assert lines[0].index("0") == lines[1].index("0123")


def test_damaged_files_are_refused_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(StageFileError, match="not readable as JSON"):
        write_report(folder)
    write_json(folder / "evaluation.json", "spectrum", {})
    with pytest.raises(StageFileError, match="not an isingcut evaluation file"):
        write_report(folder)
    write_json(folder / "evaluation.json", "evaluation", {"samples": 1})
    with pytest.raises(StageFileError, match="tokens: it is missing") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.md").exists()
    assert not (folder / "report.json").exists()
    with pytest.raises(StageFileError, match="not there"):
        write_report(tmp_path / "elsewhere")


# model card ---------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


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


def healed() -> dict[str, Any]:
    return healing([{"step": 1, "tokens": 512, "loss": 1.0}], [10, 11], N)


def patch(**more: Any) -> dict[str, Any]:
    text = {"source": "-", "samples": 7, "searched": 4, "tokens": 700, "asked": 900, "short": ""}
    cut = {"removed": [3, 4], "block": 2, "layer": "mlp.down_proj", "held_out_error_left": 0.4}
    proof = {"inputs": "text", "difference": 1e-7, "remarks": []}
    found = {"cuts": [cut], "changed": True, "unpatched": [], "text": text, "proof": proof}
    return {**found, **more}


def test_a_patch_is_told_with_its_text_and_its_proof() -> None:
    said = words.patch_story(patch())
    assert (
        "700 tokens of standard input (4 samples that the energy was measured on and 3 oth" in said
    )
    assert "on text they differ by 1.0e-07" in said
    assert "asked for" not in said
    short = {**patch()["text"], "short": "the source has no more"}
    refused = [{"removed": [0, 0], "reason": "nothing stands before it"}]
    said = words.patch_story(patch(text=short, unpatched=refused))
    assert "each cut that can take one" in said
    assert "900 were asked for, but the source has no more" in said


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


def test_what_is_not_patched_is_said_once_or_cut_by_cut() -> None:
    refused = [{"removed": [i, i + 1], "reason": "a norm"} for i in (3, 7)]
    assert words.patch_warnings({"unpatched": refused}) == ["not patched: a norm"]
    some = words.patch_warnings({"patch": patch(unpatched=refused[:1])})
    assert some == ["not patched at blocks 3 to 4: a norm"]
    scores = {"last": "patched", "kl": 0.5, "cut": {"kl": 0.4}}
    (worse,) = words.patch_warnings(scores)
    assert "KL is 0.5000 with it and 0.4000 without" in worse
    assert words.patch_warnings({**scores, "kl": 0.3}) == []


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


def test_an_error_of_our_own_is_not_blamed_on_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(files: Any) -> str:
        return str({}["a name that rendering lacks"])

    monkeypatch.setattr("isingcut.report.write.report_page", broken)
    with pytest.raises(KeyError, match="a name that rendering lacks"):
        write_report(folder)
    assert not (folder / "report.md").exists()


def test_reporting_loads_no_torch(folder: Path) -> None:
    record(folder)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from isingcut.report import card, write\n"
        f"p = Path({str(folder)!r})\nwrite.write_report(p)\n"
        "card.model_card(card.card_parts(p, p, [1]))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert json.loads((folder / "report.json").read_text())["blocks"] == N
