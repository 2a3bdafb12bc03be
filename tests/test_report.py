"""The report and the model card show what the files hold, and report missing files."""

import math
import re
from pathlib import Path

import pytest
import yaml
from jinja2 import Environment
from lm_eval.utils import make_table
from markdown_it import MarkdownIt

from isingcut.cli import show
from isingcut.files.cuts import CardParts, CutRecord, PatchRecord
from isingcut.files.evaluations import EvaluationFile, FurtherScores
from isingcut.files.healings import HealingFile
from isingcut.files.states import (
    CandidatesFile,
    ChosenState,
    Correlations,
    Judged,
)
from isingcut.report import card, rows, words
from isingcut.report.words import fence_text
from run_files import (
    answers,
    baseline,
    card_parts,
    change,
    fidelity,
    files_of,
    healing,
    model_card,
    patch,
    record,
    run_content,
    task,
    write_report,
    write_run,
)
from shared import (
    StageFileError,
    load_json,
    parametrize,
    read_document,
    refuses,
    write_json,
)

N = 12


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "r", extras=False)


def page_of(folder, target=None):
    write_report(folder, target)
    return ((target or folder) / "report.md").read_text()


def section(page, title):
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_a_finished_run_is_recognised_by_its_files(folder):
    page = page_of(folder)
    chosen = load_json(folder / "candidates.json").chosen
    assert page.startswith("# a-model without 3 of its 12 blocks\n")
    a, b, c = chosen.removed
    assert f"Removed: blocks {a}, {b} and {c} (of 12, numbered from 0)." in page
    assert (
        f"energy {chosen['energy']:.4g} nats/token. Reason: lowest measured KL" in page
    )
    table = section(page, "Before and after")
    assert "| perplexity | 20.00 ± 0.50 | 29.00 ± 0.50 | +45.0 % |" in table
    assert "| KL to the original, nats/token | 0 | 0.9000 ± 0.0100 |  |" in table
    assert "| parameters, million | 14.00 | 11.00 | -21.4 % |" in table
    assert "555 tokens in 5 samples" in table
    ranks = section(page, "How well the energy ranks")
    rows = {"pairwise": "0.90 (0.80 to 0.95)"}
    rows["empirical-fisher"] = "-0.25 (-0.35 to -0.20)"
    for energy, shown in rows.items():
        assert f"| `{energy}` | KL | candidates and random | {shown}" in ranks
    assert "Warning" not in ranks
    assert 'from_pretrained("r/model")' in section(page, "Load the model")
    assert "Not run" not in page
    part = section(page, "Provenance")
    for fact in (
        "`sha-of-a-model`",
        "`text-0`",
        "seed=0",
        "isingcut run a-model",
        "2.9.0",
        "a CPU \\| with a bar",
        "| calibration | `calibration.safetensors` | 1.2 |",
    ):
        assert fact in part
    assert "77.0" not in part
    data = load_json(folder / "report.json")
    assert data.removed == chosen.removed
    assert data.not_run == []
    for name in ("evaluation", "candidates"):
        found = load_json(folder / f"{name}.json")
        assert data[name] == {
            k: v for k, v in found.items() if k not in ("format", "version")
        }
    assert data.provenance.model.sha256 == "sha-of-a-model"


def test_a_reason_is_told_in_words(folder):
    chosen = load_json(folder / "candidates.json").chosen
    change(folder / "candidates.json", chosen={**chosen, "why": "ground"})
    assert "the ground state, as --choose ground says (KL " in page_of(folder)


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


def rates(folder, name, before, after):
    """Give both models of an evaluation a speed."""
    found = load_json(folder / "evaluation.json")
    found["before"] |= {f"{name}_tokens_per_second{k}": v for k, v in before.items()}
    found["after"] |= {f"{name}_tokens_per_second{k}": v for k, v in after.items()}
    change(folder / "evaluation.json", **found)
    return page_of(folder)


def test_a_speed_up_has_the_error_of_both_timings(folder):
    page = rates(folder, "decode", {"": 20.0, "_se": 3.0}, {"": 25.0, "_se": 5.0})
    # 1.25 x the root of 0.15 squared and 0.2 squared.
    assert (
        "\n- speed: decodes 1.25 ± 0.31 times as fast (20.0 → 25.0 tokens/s)\n" in page
    )
    assert "+25.0 ± 31.2 %" in page


POOR = "Do not deploy this as a chat model: it is often wrong"


@parametrize(
    "ended, likely, followed, said",
    [
        (5, -1.0, 0.25, "Expect fluent text with many mistakes"),
        (4, -1.0, 0.25, POOR),
        (12, -2.0, 0.25, POOR),
        (12, -1.0, 0.05, POOR),
        (12, -1.0, 0.24, "Expect nearly the same answers"),
    ],
)
def test_the_worse_of_loss_and_answers_speaks(folder, ended, likely, followed, said):
    """Of 12 prompts the original answers 10; it follows 25 % of the instructions."""
    pairs = [
        answers("Yes.", "Yes yes", ended=k < ended, likelihood=likely)
        for k in range(12)
    ]
    for k, pair in enumerate(pairs):
        pair["before"] |= {"ended": k < 10, "likelihood": -1.0}
    chat = {"limit": 64, "chat": True, "pairs": pairs}
    change(folder / "evaluation.json", kl=0.09, answers=chat)
    row = {**task("instructions", 0.25, followed), "metric": "followed,none"}
    write_json(folder / "benchmarks.json", "benchmarks", {"rows": [row], "engine": "x"})
    page = page_of(folder)
    first = page.split("\n\n")[1]
    assert first.startswith(said)
    assert ("worse than that KL suggests" in first) == ("nearly" not in said)
    left = ended * (likely == -1)
    shares = f"({100 * left / 12:.0f} and 83 %)"
    assert page.split("\n\n")[2] == (
        f"- answered: {left} of 12 prompts as the original could, original 10 {shares}"
    )
    assert (
        f"- answers: {ended} of 12 end by themselves (original 10); 0 % of "
        "their text is repetition (original 0 %); instructions: "
        f"{100 * followed:.0f} % followed (original 25 %)\n"
    ) in page
    # A base model does not converse.
    change(folder / "evaluation.json", answers={**chat, "chat": False})
    assert "- answered" not in page_of(folder)


def test_lm_eval_s_table_shows_the_scores(tmp_path):
    folder = write_run(tmp_path / "r")
    rows = [task("ours", 0.5, 0.25), {**task("gsm8k", 0.04, 0.01), "original_se": None}]
    rows[1]["metric"] = "exact_match,flexible-extract"
    change(folder / "benchmarks.json", rows=rows)
    for name, scores in (("original", (0.5, 0.04)), ("final", (0.25, 0.01))):
        write_report(folder)
        found = load_json(folder / f"results_{name}.json")
        table = [line.split("|") for line in make_table(found).splitlines()[2:]]
        cells = [[line[k].strip() for k in (1, 3, 5, 7)] for line in table]
        # The harness sorts tasks by name.
        kinds = [["flexible-extract", "exact_match"], ["none", "acc"]]
        assert [row[:3] for row in cells] == [["gsm8k", *kinds[0]], ["ours", *kinds[1]]]
        assert [float(row[3]) for row in cells] == [*scores[::-1]]
        assert (table[0][9].strip() == "N/A") == (name == "original")


def test_the_answers_of_tasks_are_pooled_with_those_to_prompts(tmp_path):
    folder = write_run(tmp_path / "r")
    ending = {"tokens": 4, "ended": True, "repeated": 0.0}
    worse = ending | {"ended": False, "repeated": 0.5}
    pairs = [{"before": ending, "after": after} for after in (ending, worse, worse)]
    rows = [{**task("ours", 0.5, 0.5), "endings": pairs}]
    change(folder / "benchmarks.json", rows=rows)
    page = page_of(folder)
    assert "answers: 2 of 4 end by themselves (original 4); 25 % of their text" in page
    # The changes are 0, 0, -1 and -1.
    (ended,) = (row for row in files_of(folder).scores if row.key == "answers_ended")
    assert (ended.change, ended.notes) == ("-50 ± 29", ["n = 4"])


@parametrize("kl, band", [(0.09, 0), (0.1, 1), (0.3, 2), (0.6, 3), (1.2, 4)])
def test_the_first_sentence_judges_by_the_table_of_the_page(folder, kl, band):
    page = (Path(__file__).parents[1] / "docs/loss.md").read_text()
    found = re.findall(
        r"^\| ([^|]+) \| ([^|]*) \| ((?:expect|do not) .*) \|$", page, re.M
    )
    *cells, said = found[band]
    bounds = [
        math.inf if "above" in c or not c else float(c.strip("% ").split()[-1])
        for c in cells
    ]
    assert (bounds[0], bounds[1] / 100, said) == rows.BANDS[band]
    assert len(found) == len(rows.BANDS)
    first = f"{said[0].upper()}{said[1:]} (KL {kl:.3f} ± 0.010 nats per token on unseen text)."
    change(folder / "evaluation.json", kl=kl)
    assert page_of(folder).split("\n")[2] == first
    html = (folder / "report.html").read_text()
    assert f"<strong>{words.code(first)}</strong>" in html
    assert files_of(folder).judgement[0] == first
    ranked = load_json(folder / "candidates.json")
    for row in ranked.candidates:
        row["kl"] = kl
    change(folder / "candidates.json", **ranked)
    shown = model_card(folder, ranked.chosen.removed)
    assert f"At such a KL, {said}." in shown


@parametrize(
    "error, cell, ends",
    [
        (0.1, "-0.4000 ± 0.1000 │", "."),
        (0.21, "-0.4000 ± 0.2100 │ within the noise │", ", within the noise."),
    ],
)
def test_the_end_of_a_healing_has_the_paired_verdict(folder, capsys, error, cell, ends):
    # The difference is 0.4 nats.
    document = healing([{"step": 1, "tokens": 5, "loss": 1.0}], [10], N)
    document["after"] |= {"kl_change_se": error, "nll_change_se": 0.1}
    found = HealingFile.model_validate(document)
    show.show_healing(found, folder)
    said = " ".join(capsys.readouterr().out.split())
    assert cell in said
    verdict = "Expect fluent text with many mistakes (KL 0.5000 ± 0.0100 nats per token on unseen"
    change_by = f"Healing changed the KL by -0.4000 ± {error:.4f}{ends}"
    assert said.endswith(f"{verdict} text). {change_by}")
    assert change_by in card.healed_card(card_parts(folder, [10]), "", found)
    (folder / "healed").mkdir()
    write_json(folder / "healed/healing.json", "healing", document)
    page_of(folder)
    assert "within the noise" in (folder / "report.html").read_text()


@parametrize("name", NAMES)
def test_a_name_stands_for_itself_in_markdown(folder, name):
    run = run_content(name, "pairwise", N, 3, 0)
    run["provenance"]["calibration"]["source"] = name
    change(folder / "run.json", **run)
    scores = {"perplexity": 2.0, "perplexity_se": 0.1, "nll": 3.0, "nll_se": 0.1}
    part = {"before": scores, "after": scores, "kl": 9.0, "kl_se": 0.1}
    parts = {name: {**part, "samples": 1, "tokens": 5}}
    change(folder / "evaluation.json", parts=parts)
    report = read(page_of(folder))
    card = read(model_card(folder, [10, 11]).split("---\n", 2)[2])
    tokens = [t for block in report + card for t in (block, *(block.children or ()))]
    kinds = {t.type for t in tokens if not t.content.startswith("<!-- isingcut-seal")}
    assert not kinds & {"html_block", "html_inline", "image", "em_open", "s_open"}
    addresses = {t.attrs["href"] for t in tokens if t.type == "link_open"}
    assert addresses == {"https://arxiv.org/abs/2602.00161"}
    # Only backticks are not shown: they turn the text between them into code.
    shown = re.sub(r"\s+", " ", name.replace("`", ""))
    said = ["".join(t.content for t in block.children or ()) for block in report]
    assert f"{shown} without 3 of its 12 blocks" in said
    assert f"isingcut run {shown} --remove 3 --out run" in said
    assert any(cell.startswith(f"{shown} (energy: ") for cell in said)
    assert f"{shown}: perplexity" in said


def read(page):
    """Return the tokens of a page of Markdown."""
    return MarkdownIt().enable(["table", "strikethrough"]).parse(page)


def test_the_map_has_one_row_per_state_and_one_column_per_block(folder):
    page = page_of(folder)
    shown = section(page, "How the blocks were chosen").partition("| rank |")[2]
    lines = [line for line in shown.splitlines()[2:] if line]
    found = load_json(folder / "candidates.json")
    for line, row in zip(lines, found.candidates, strict=True):
        rank, _, kl, blocks, removed = line.strip("| ").split(" | ")
        assert [i for i, c in enumerate(blocks.strip("`")) if c == "·"] == row.removed
        assert removed == " ".join(map(str, row.removed))
        assert kl == f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        assert rank.startswith("\\*") == (row.removed == found.chosen.removed)


@parametrize(
    "missing, title, stage",
    [
        ("evaluation.json", "Before and after", "evaluate"),
        ("candidates.json", "How well the energy ranks", "rank"),
        ("spectrum.json", "How the blocks were chosen", "solve"),
        ("model/isingcut.json", "Load the model", "excise"),
    ],
)
def test_an_absent_stage_is_reported_as_not_run(folder, missing, title, stage):
    proof = {**patch()["proof"], "remarks": ["text only"]}
    change(folder / "model/isingcut.json", proof=proof)
    (folder / missing).unlink()
    page = page_of(folder)
    assert page.count("**Warning.** text only") == (stage != "excise")
    part = section(page, title)
    assert "Not run: " in part
    assert f"`isingcut {stage} r`" in part
    assert page.count("Not run") == 1
    assert load_json(folder / "report.json").not_run == [stage]
    assert f"isingcut {stage} r" in (folder / "report.html").read_text()


def test_another_removal_has_its_own_report_and_commands(folder):
    (folder / "remove-5").mkdir()
    page = page_of(folder, folder / "remove-5")
    assert "`isingcut rank r --remove 5`" in page
    assert "| solve | `remove-5/spectrum.json` | 77.0 |" in page
    assert "| calibration | `calibration.safetensors` | 1.2 |" in page
    assert "| solve | `spectrum.json` |" not in page
    assert not (folder / "report.md").exists()
    stages = load_json(folder / "run.json").stages
    stages["remove-5/spectrum.json"]["options"] = {"remove": "", "budget": "params=25%"}
    change(folder / "run.json", stages=stages)
    assert "`isingcut rank r --budget params=25%`" in page_of(
        folder, folder / "remove-5"
    )


@parametrize(
    "found, said",
    [
        (fidelity(0.95, 33, 0.9), ""),
        (fidelity(0.2, 33, -0.1), "ranked the measured states poorly (Spearman 0.20"),
        (fidelity(-0.6, 33, -0.8), "poorly (Spearman -0.60"),
        (fidelity(0.8, 33, 0.3), "reaches down to 0.30"),
        (fidelity(None, 33), "undefined"),
        (fidelity(None, 0), ""),
    ],
)
def test_a_poor_or_unknown_fidelity_is_a_plain_warning(folder, found, said):
    change(folder / "candidates.json", fidelity={"kl": found})
    page = page_of(folder)
    assert page.count("**Warning.**") == bool(said)
    assert said in page
    assert ("| undefined |" in page) == (found["spearman"] is None and found["n"] > 0)
    value = words.correlation_text(Correlations(**found))
    assert (value == "not measured") == (found["n"] == 0)


def test_a_random_state_was_measured_on_tokens_of_its_own(folder):
    change(folder / "candidates.json", random_tokens=111)
    found = read_document(folder / "candidates.json", CandidatesFile)
    assert "On 111 tokens" in words.sentence(
        "measured_cut", found, found.random[0].removed
    )


@parametrize(
    "energy, unit, kl, lowest, said",
    [
        ("pairwise", "nats/token", 1.5, 0.6, "use --energy auto"),
        ("refined", "nats/token", 1.5, 0.6, "--effort"),
        ("empirical-fisher", "arbitrary", 1.5, -0.6, ""),
        ("pairwise", "nats/token", 1.1, 0.6, ""),
        ("pairwise", "nats/token", 1.1, -0.6, "1 of the 2 candidates below zero"),
    ],
)
def test_an_energy_that_prices_states_far_too_low_is_a_warning(
    energy, unit, kl, lowest, said
):
    chosen = ChosenState.model_construct(energy=0.6, kl=kl)
    found = CandidatesFile.model_construct(
        fidelity=Judged(kl=Correlations(**fidelity(0.95, 33, 0.9))),
        candidates=[ChosenState.model_construct(energy=lowest, kl=1.5), chosen],
        chosen=chosen,
        energy_unit=unit,
    )
    lines = words.ranking_warnings(energy, found)
    assert len(lines) == bool(said)
    assert all(said in x and "measured KL is" in x and "1.5" in x for x in lines)


def test_generated_text_cannot_break_out_of_its_block(folder):
    assert fence_text("a ``` b").startswith("````text\n")
    assert "````text\nSo ``` so.\n````" in page_of(folder)


def test_a_patch_is_reported_with_its_text():
    def said(**more):
        return words.sentence("patch_story", PatchRecord.model_validate(patch(**more)))

    text = "700 tokens of standard input (4 samples that the energy was measured on and 3 oth"
    assert text in said()
    assert "--patch-tokens is" not in said()
    short = {**patch()["text"], "short": "the source has no more"}
    refused = [{"removed": [0, 0], "reason": "nothing stands before it"}]
    partly = said(text=short, unpatched=refused)
    assert "each cut that can take one" in partly
    assert "--patch-tokens is 900, but the source has no more" in partly


def test_unpatched_cuts_are_reported_once_or_cut_by_cut():
    refused = [{"removed": [i, i + 1], "reason": "a norm"} for i in (3, 7)]
    single = [{"removed": [3, 3], "reason": "a norm"}]
    for expected, found in {
        "not patched: a norm": patch(unpatched=refused, cuts=[]),
        "not patched at blocks 3 to 4: a norm": patch(unpatched=refused[:1]),
        "not patched at block 3: a norm": patch(unpatched=single),
    }.items():
        cut = CutRecord.model_validate({"removed": [3, 4], "of": N, "patch": found})
        assert words.patch_warnings(cut) == [expected]
    exact = FurtherScores.model_construct(kl=0.4)
    worse = EvaluationFile.model_construct(last="patched", kl=0.5, cut=exact)
    (said,) = words.patch_warnings(worse)
    assert "KL is 0.5000 with it and 0.4000 without" in said
    assert words.patch_warnings(worse.model_copy(update={"kl": 0.3})) == []


def test_other_methods_stand_with_the_chosen_state_lowest_first(folder):
    for name, kl, more in (
        ("sleb", 90.0, {}),
        ("cbo", 0.125, {}),
        ("none", 0.0625, {"violated": ["keep 0", "keep 2"]}),
    ):
        content = baseline(name, [0, 3, 5], kl, **more)
        write_json(folder / f"baseline-{name}.json", "baseline", content)
    part = section(page_of(folder), "Baselines")
    rows = [line for line in part.splitlines() if line.startswith("| ")][1:]
    figures = "3.5000 ± 0.1000 | 12.5 | 1000"
    assert rows[:2] == [
        f"| `none` | 0, 3 and 5 | 0.0625 ± 0.0500 | {figures} | keep 0, keep 2 |",
        f"| `cbo` | 0, 3 and 5 | 0.1250 ± 0.0500 | {figures} | none |",
    ]
    assert rows[2].startswith("| chosen (`pairwise`) | ")
    # The energy did not count its passes.
    assert rows[2].endswith(" | not counted | 40 | none |")
    assert rows[3].startswith("| `sleb` | ")
    # A method that breaks a constraint does not win.
    assert "**Warning.** cbo found a lower KL" in part


def test_an_error_of_our_own_is_not_blamed_on_the_files(folder, monkeypatch):
    def broken(files):
        return str({}["a name that rendering lacks"])

    monkeypatch.setattr("isingcut.report.write.report_view", broken)
    with pytest.raises(KeyError, match="a name that rendering lacks"):
        write_report(folder)
    assert not (folder / "report.md").exists()


def front_matter(card):
    _, head, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert isinstance(parsed, dict)
    return parsed


def test_the_card_says_what_how_and_from_whom(folder):
    change(folder / "run.json", **run_content("smollm2", "pairwise", N, 3, 0))
    chosen = load_json(folder / "candidates.json").chosen
    card = model_card(folder, chosen.removed)
    head = front_matter(card)
    base = ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune")
    assert (head["base_model"], head["base_model_relation"]) == base
    assert head["library_name"] == "transformers"
    assert "isingcut" in head["tags"]
    assert f"3 of 12 blocks removed: {', '.join(map(str, chosen['removed']))}" in card
    assert "arXiv:2602.00161" in card
    assert "patent" in card
    assert "The energy used here, `pairwise`, is not that paper's." in card
    figures = f"{chosen['kl']:.4f} ± {chosen['kl_se']:.4f} nats per token."
    assert f"{figures} Because the choice was made on it" in card
    assert "GGUF" not in card
    rows = load_json(folder / "candidates.json").candidates
    other = next(row.removed for row in rows if row.removed != chosen.removed)
    assert "Because the choice" not in model_card(folder, other)


def test_the_card_does_not_claim_the_papers_energy_is_not_the_papers(folder):
    run = run_content("smollm2", "empirical-fisher", N, 3, 0)
    change(folder / "run.json", **run)
    assert "is that paper's empirical-Fisher estimate." in model_card(folder, [10, 11])


def test_the_card_of_a_local_model_tells_no_path(folder):
    run = run_content("/home/someone/models/mine", "pairwise", N, 3, 0)
    run["provenance"]["model"] |= {"sha256": "aa11", "gguf_sha256": "cc33"}
    change(folder / "run.json", **run)
    card = model_card(folder, [10, 11])
    assert "base_model" not in front_matter(card)
    assert "/home/someone" not in card
    assert card.count("mine") >= 2
    assert "unpacked to bfloat16" in card


def test_the_card_of_a_model_in_the_current_folder_has_its_name(folder):
    run = run_content(".", "pairwise", N, 3, 0)
    places = {"absolute": "/home/someone/mine", "relative": "../mine"}
    run["provenance"]["model_path"] = places
    change(folder / "run.json", **run)
    assert "\n# mine without 2 of its 12 blocks\n" in model_card(folder, [10, 11])


def test_the_card_without_a_ranking_claims_no_measurement(folder):
    (folder / "candidates.json").unlink()
    card = model_card(folder, [1, 2])
    assert "no measured ranking for this choice" in card
    assert "KL divergence" not in card


@parametrize("held_out, tuned", [(None, False), ([0.5, 0.4], True), ([4, 5], False)])
def test_a_card_says_whether_a_patch_was_tuned(folder, held_out, tuned):
    tuning = {"layers": [{"block": 2, "layer": "mlp.up_proj"}], "held_out_kl": held_out}
    tuning |= {"steps": 9, "held_out_predictions": 99}
    found = PatchRecord.model_validate(patch(tuning=tuning if held_out else None))
    said = model_card(folder, [10, 11], patch=found)
    assert ("tuned on the loss for a few steps" in said) == tuned
    assert ("Nothing was trained by gradients" in said) != tuned
    assert ("linear layers of block 2 were tuned" in said) == bool(held_out)


def test_a_healed_card_is_made_anew_from_the_parts_of_the_cut(folder):
    steps = [{"step": 1, "tokens": 5, "loss": 1.0}]
    healed = HealingFile.model_validate(healing(steps, [10], N))
    cut = model_card(folder, [10, 11])
    found = card.healed_card(card_parts(folder, [10, 11]), cut, healed)
    assert front_matter(found) == front_matter(cut)
    assert "no weight was trained" not in found
    assert "Before the cut model was accepted" in found
    assert "Distillation from the original (`lora`)" in found
    assert "| perplexity | 29.00 ± 0.50 | 24.00 ± 0.50 |" in found
    assert found.index("## How") < found.index("## Healed") < found.index("## Source")
    assert "## Healed" not in cut
    # A card of another tool keeps its text.
    other = card.healed_card(None, "# mine\n\nBe careful.\n\n\n", healed)
    assert other.startswith("# mine\n\nBe careful.\n\n## Healed\n")
    assert "| 0.9000 ± 0.0100 | 0.5000 ± 0.0100 |" in other


def test_what_was_made_from_an_earlier_stage_is_not_there(folder):
    (folder / "model.gguf").touch()
    record(folder)
    stages = load_json(folder / "run.json").stages
    made = stages["evaluation.json"]
    readers = {"spectrum.json": "energy", "candidates.json": "energy"}
    readers |= {"evaluation.json": "model", "model.gguf": "model"}
    for fingerprint, there in (("0", True), ("1", False)):
        for key, source in readers.items():
            stages[key] = {**stages.get(key, made), "options": {source: fingerprint}}
        change(folder / "run.json", stages=stages)
        files = files_of(folder)
        found = (files.spectrum, files.candidates, files.evaluation, files.gguf)
        assert [one is not None for one in found] == [there] * 4


def test_choices_for_an_earlier_removal_are_not_compared(folder):
    for name, removed in (("sleb", [0, 1, 2]), ("cbo", [0, 1])):
        content = baseline(name, removed, 0.001)
        write_json(folder / f"baseline-{name}.json", "baseline", content)
    record(folder)
    assert [b.baseline for b in files_of(folder).baselines] == ["sleb"]


def test_parts_of_a_card_are_read_from_the_record_of_the_cut(folder):
    parts = card_parts(folder, [10, 11]).model_copy(
        update={"loads_with": "AutoModelForX"}
    )
    file = folder / "model/isingcut.json"
    assert files_of(folder).loads_with == "AutoModelForCausalLM"
    change(file, card=parts.content())
    assert files_of(folder).removal.card == parts
    assert "from transformers import AutoModelForX\n" in card.model_card(parts)
    assert files_of(folder).loads_with == "AutoModelForX"
    change(file, card={**CardParts.content(parts), "rows": [["one"]]})
    with refuses(r"isingcut\.json is damaged: card\.rows\.0", StageFileError):
        _ = files_of(folder).removal


def test_templates_call_named_functions_alone():
    names = {*words._pages(True).globals} - {*Environment().globals}
    assert {"sentence", "table", "meter"} < names
    assert not names & {
        "render",
        "render_page",
        "resources",
        "re",
        "Any",
        "_pages",
        "files",
    }
