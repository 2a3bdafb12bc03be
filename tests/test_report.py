"""The report says what the files say, and says so when a file is not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from isingcut.errors import StageFileError
from isingcut.files.writing import read_json, write_json
from isingcut.report import words
from isingcut.report.fidelity import fidelity_warnings, ranking_warnings
from isingcut.report.render import fenced
from isingcut.report.words import spectrum_map
from run_files import model_card, record, write_report
from small_run import (
    STATES,
    N,
    change,
    correlation,
    patch,
    run_json,
    section,
    side,
    write_small_run,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "r")


def page_of(folder: Path, target: Path | None = None) -> str:
    write_report(folder, target)
    return ((target or folder) / "report.md").read_text(encoding="utf-8")


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


NAMES = (
    "<script>alert(1)</script>",
    "a`<b>x</b>`",
    "``<b>x</b>",
    "a\\`<b>x</b>",
    "[x](http://a.b)",
    "![x](http://a.b)",
    "*a* _b_ ~~c~~ my_model_v2",
    "a|b \\| c",
    "&lt;b&gt; &amp;",
    "a\n\n<b>x</b>",
    "a\\",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_itself_in_markdown(tmp_path: Path, name: str) -> None:
    folder = write_small_run(tmp_path / "r")
    run = run_json(model=name)
    run["provenance"]["command_line"] = f"isingcut run {name}"
    run["provenance"]["calibration"]["source"] = name
    write_json(folder / "run.json", "run", run)
    scores = {"perplexity": 2.0, "perplexity_se": 0.1, "nll": 3.0, "nll_se": 0.1}
    part = {"samples": 1, "tokens": 5, "before": scores, "after": scores, "kl": 9.0, "kl_se": 0.1}
    change(folder / "evaluation.json", "evaluation", parts={name: part})
    report = read(page_of(folder))
    card = read(model_card(folder, folder, [10, 11]).split("---\n", 2)[2])
    tokens = [t for block in report + card for t in (block, *(block.children or ()))]
    kinds = {t.type for t in tokens if not t.content.startswith("<!-- isingcut-seal")}
    assert not kinds & {"html_block", "html_inline", "image", "em_open", "s_open"}
    addresses = {t.attrs["href"] for t in tokens if t.type == "link_open"}
    assert addresses == {"https://arxiv.org/abs/2602.00161"}
    # Backticks alone are not shown: they make code of what is between them.
    shown = re.sub(r"\s+", " ", name.replace("`", ""))
    said = ["".join(t.content for t in block.children or ()) for block in report]
    assert f"{shown} without 2 of its 12 blocks" in said
    assert f"isingcut run {shown}" in said
    assert any(cell.startswith(f"{shown} (energy: ") for cell in said)
    assert f"{shown}: perplexity" in said


def read(page: str) -> list[Token]:
    """The blocks of a page of Markdown."""
    return MarkdownIt().enable(["table", "strikethrough"]).parse(page)


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


def test_what_is_not_patched_is_said_once_or_cut_by_cut() -> None:
    refused = [{"removed": [i, i + 1], "reason": "a norm"} for i in (3, 7)]
    assert words.patch_warnings({"unpatched": refused}) == ["not patched: a norm"]
    some = words.patch_warnings({"patch": patch(unpatched=refused[:1])})
    assert some == ["not patched at blocks 3 to 4: a norm"]
    scores = {"last": "patched", "kl": 0.5, "cut": {"kl": 0.4}}
    (worse,) = words.patch_warnings(scores)
    assert "KL is 0.5000 with it and 0.4000 without" in worse
    assert words.patch_warnings({**scores, "kl": 0.3}) == []


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
