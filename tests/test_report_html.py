"""The HTML report without a browser: well formed, self-contained, complete, and safe."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path

import numpy as np

from isingcut.report.figures import block_ticks
from isingcut.report.plots import span, tick_text
from isingcut.report.words import code
from run_files import (
    answers,
    change,
    first_part,
    hamiltonian,
    write_comparison,
    write_report,
    write_run,
)
from shared import (
    OutputExistsError,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    save_json,
    works,
    write_json,
)

VOID = {"meta", "link", "br", "col", "img"}


class Page(HTMLParser):
    """The elements of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.elements = []
        self.words = []
        self.data = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script" and data.startswith("{"):
            self.data = json.loads(data)
        if inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def tagged(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    def classed(self, name):
        return [a for _, a in self.elements if name in a.get("class", "").split()]

    @property
    def states(self):
        """The rows of states."""
        return [row for row in self.tagged("tr") if "data-state" in row]

    @property
    def marks(self):
        """The number of marks in charts, by kind."""
        return Counter(
            kind for a in self.classed("mark") for kind in a["class"].split()
        )


def page_of(folder, target=None):
    write_report(folder, target)
    return Page(((target or folder) / "report.html").read_text())


@module_fixture
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@module_fixture
def page(run):
    return page_of(run)


def test_the_page_needs_nothing_else(run, page):
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "base")
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert attributes.get("href", "#").startswith(("#", "data:"))
    source = (run / "report.html").read_text()
    assert "@import" not in source
    assert "url(" not in source
    assert "://" not in source
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_every_figure_holds_its_data(page):
    n = 12
    states = 20
    random = 30
    assert len(page.states) == states + 3  # 20 on the map, two baselines and the choice
    assert len(page.classed("k")) + len(page.classed("r")) == n * (1 + states + 3)
    assert len(page.classed("d")) == n
    kinds = page.marks
    # Two scatters: 50 each. Trade-offs: the original thrice, the two measured removals twice and
    # two speeds. Healing: 30.
    assert kinds["mark"] == 2 * (states + random) + 3 + 2 + 2 + 2 + 30
    assert kinds["healed"] == 30
    assert kinds["original"] == 3
    figures = """
        map fields couplings scatter-pairwise scatter-empirical-fisher correlations
        pareto-parameters pareto-cache pareto-speed rivals healing flips
    """
    assert {a["id"] for a in page.tagged("figure")} == {*figures.split()}
    assert "not run" not in page.text.lower()


def test_each_task_is_a_bar_over_its_flips(run, page):
    assert "Equal accuracy can hide flips" in page.text
    # Equal scores of 50 %, and half of the answers flipped.
    (picture,) = (
        a for a in page.tagged("svg") if "winogrande" in a.get("data-tip", "")
    )
    words = "winogrande: 50.0 → 50.0 %\nright to wrong: 25.0 %\nwrong to right: 25.0 %"
    assert picture["data-tip"] == picture["aria-label"] == words
    lost, won = (
        [(float(a["x"]), float(a["width"])) for a in page.classed(kind) if "x" in a]
        for kind in ("lost", "won")
    )
    # The task without flips, of an earlier version, has no bar.
    assert lost == [(50, 12), (25, 25), (1, 3)]
    assert won == [(62, 5), (50, 25), (4, 0)]
    ends = [a["d"] for a in page.classed("final") if "d" in a]
    assert ends[1] == "M50.0 5H50.0M50.0 0v10"
    cells = "arc_easy 20.0 (10.0 to 31.0) 12.0 (6.0 to 19.0) 5.0 (2.5 to 8.5)"
    assert f"{cells} 81.1 (72.0 to 91.5) 0.2100" in page.text
    markdown = (run / "report.md").read_text()
    row = "| gsm8k | 6.0 (3.0 to 10.0) | 3.0 (1.5 to 5.5) | 0.0 (0.0 to 1.0)"
    assert f"{row} | 25.0 (0.0 to unbounded) | – |" in markdown
    assert "| boolq | " not in markdown


def test_every_coupling_has_the_colour_of_its_sign(page):
    coupling = hamiltonian(12, 1).J
    cells = [a for a in page.tagged("rect") if "fill-opacity" in a]
    pairs = permutations(range(12), 2)
    assert [(a["class"], int(a["x"])) for a in cells] == [
        ("p" if coupling[pair] > 0 else "n", pair[1]) for pair in pairs
    ]


def test_pairs_that_were_never_removed_together_are_hatched(tmp_path):
    run = write_run(tmp_path / "run", extras=False)
    energy = hamiltonian(12, 1)
    coupling = energy.J.copy()
    coupling[2:, 2:] = 0.0
    meta = {**energy.meta, "search": {"targets": {}}}
    energy = replace(energy, J=coupling, meta=meta)
    energy.save(run / "hamiltonian.safetensors")
    page = page_of(run)
    assert len(page.classed("u")) == 90
    assert page.classed("hatch")[0]["d"].count("M") == 90
    assert "1 not measured" not in page.text
    assert "45 other pairs were never removed together: not measured." in page.text
    assert len(page.classed("unmeasured")) == 1
    assert [page.data["J"][i][j] for i, j in ((2, 3), (11, 10), (4, 4))] == [
        None,
        None,
        0.0,
    ]
    assert "strongest couplings (21 rows)" in page.text
    # Other energies measure every pair, so a J of 0 is a figure.
    replace(energy, meta={}).save(run / "hamiltonian.safetensors")
    page = page_of(run)
    assert not page.classed("u") + page.classed("hatch") + page.classed("unmeasured")


def test_the_first_answers_are_open(page):
    assert "open" in page.tagged("details")[0]
    assert "Because." in page.text


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.tagged("a")}
    assert targets <= set(ids)
    assert {"states", "interactions", "fidelity", "provenance", "healed"} <= targets


def test_the_words_are_those_of_the_files(run, page):
    chosen = load_json(run / "candidates.json").chosen
    assert f"KL {chosen['kl']:.4f} ± {chosen['kl_se']:.4f} nats per token" in page.text
    assert "a-model without 3 of its 12 blocks" in page.text
    assert "Spearman 0.90 (0.80 to 0.95) over n = 50" in page.text
    assert "Spearman −0.25 (−0.35 to −0.20)" in page.text
    task = (
        "arc_easy acc, n = 500, p = 0.04 0.6200 ± 0.0200 0.5500 ± 0.0200 "
        "−0.0700 (−0.100 to −0.040)"
    )
    assert task in page.text
    assert "boolq acc, n = 500, p = 0.04, within the noise" in page.text
    assert page.text.count("within the noise, at chance level 0.5000 ± 0.0200") == 1
    assert "worst, nats 2.00 ± 0.50 4.00 +100.0 %" in page.text
    assert "perplexity 29.00 ± 0.50 24.00 ± 0.50" in page.text
    assert 'from_pretrained("run/healed")' in page.text
    assert "sha-of-a-model" in page.text
    assert "breaks keep 0" in page.text
    assert page.text.count("Warning.") == 0


def test_the_script_has_the_energy_and_the_states(page):
    energy = hamiltonian(12, 1)
    data = page.data
    np.testing.assert_allclose(data["J"], energy.J, rtol=1e-3)
    np.testing.assert_allclose(data["h"], energy.h, rtol=1e-3)
    assert len(data["states"]) == 20 + 30 + 2
    assert [s["chosen"] for s in data["states"]].count(True) >= 1


@parametrize("name, typed", [("bare", "bare"), ("my run", "'my run'")])
def test_a_run_without_extras_names_the_command(name, typed, tmp_path):
    text = page_of(write_run(tmp_path / name, extras=False)).text
    assert f"None was run. Type isingcut baseline block-influence {typed}" in text
    only = f"Only one removal is here: isingcut solve {typed} --remove 4 --remove 8"
    assert only in text
    place = f"{name}/model" if name == typed else f"'{name}/model'"
    assert f"isingcut heal {place} --text wiki --train 10min --out healed" in text
    assert "Healing" not in text
    assert "Benchmarks" not in text


def test_an_energy_alone_and_states_alone_still_make_a_page(tmp_path):
    run = write_run(tmp_path / "bare", extras=False)
    states = (run / "spectrum.json").read_bytes()
    for name in STATES:
        (run / f"{name}.json").unlink()
    page = page_of(run)
    assert "No blocks have been chosen yet." in page.text
    assert len(page.classed("heat")) == 1
    assert [a["d"] for a in page.classed("picks")] == [""]
    (run / "spectrum.json").write_bytes(states)
    (run / "hamiltonian.safetensors").unlink()
    assert not page_of(run).classed("heat")


STATES = ("evaluation", "candidates", "spectrum", "model/isingcut")


def test_a_range_of_removals_is_shown_as_a_curve(tmp_path):
    run = write_run(tmp_path / "curve")
    for name in STATES:
        (run / f"{name}.json").unlink()
    page = page_of(run)
    assert "This folder holds 2 removals" in page.text
    assert "isingcut excise curve --remove 2" in page.text
    # The original and the one measured removal in three charts.
    assert page.marks["mark"] - page.marks["healed"] == 3 + 3


def test_figures_that_were_not_measured_are_not_invented(tmp_path):
    """As in a streamed run, or with one sample, which has no error."""
    run = write_run(tmp_path / "run", extras=False)
    found = load_json(run / "evaluation.json")
    for part in (found.before, found.after):
        part["perplexity_se"] = None
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            del part[key]
    save_json(run / "evaluation.json", {**found, "answers": None, "kl_se": None})
    page = page_of(run)
    assert "decode, tokens/s not measured not measured" in page.text
    first = first_part((run / "report.html").read_text())
    assert (
        "<li>loss: perplexity of the cut model 29.00 on unseen text, original 20.00 (+45.0\u00a0%)"
        in first
    )
    assert "speed: " not in first
    assert "No speed was measured" in page.text
    markdown = (run / "report.md").read_text()
    assert "| perplexity | 20.00 | 29.00 | +45.0 % |" in markdown
    assert "| decode, tokens/s | not measured | not measured |  |" in markdown


BY_HAND = {"removed": [0, 1, 2], "of": 12}


def test_blocks_named_by_hand_have_a_row_of_their_own_and_no_reason(tmp_path):
    run = write_run(tmp_path / "run", extras=False)
    write_json(run / "model/isingcut.json", "removal", BY_HAND)
    page = page_of(run)
    assert "by hand" in page.text
    assert len(page.states) == 21
    assert [a.get("class") for a in page.states].index("chosen") == 20
    # No ranking measured that state, so that it has no place among the measured removals.
    assert "Nothing measured yet" in page.text
    markdown = (run / "report.md").read_text()
    said = "Removed: blocks 0 to 2 (of 12, numbered from 0). You named them"
    assert said in markdown
    assert "lowest measured KL" not in markdown
    assert "`*` marks" not in markdown


def test_a_healed_run_shows_the_healed_model(tmp_path):
    run = write_run(tmp_path / "run")
    write_json(run / "model/isingcut.json", "removal", BY_HAND)
    scores = {**load_json(run / "healed/healing.json").after, "kl": 0.75}
    change(
        run / "healed/healing.json",
        tokens_seen=15360,
        report_tokens=999,
        patch={"scores": scores},
        stopped={"why": "no more text after step 7", "kept": 7},
    )
    page = page_of(run)
    assert 'from_pretrained("run/healed")' in page.text
    assert "quantity original healed change" in page.text
    alone = "A linear patch was fitted at each cut (alone it brings the KL to 0.7500"
    assert alone in page.text
    assert "Distillation from the original ( lora ) over 15,360 tokens." in page.text
    assert "no more text after step 7" in page.text


def test_names_and_texts_cannot_become_markup(tmp_path):
    evil = "</script><script>alert(1)</script><b id='x'>`"
    run = write_run(tmp_path / "run", model=evil)
    pairs = [answers(evil, evil, evil)]
    change(run / "evaluation.json", answers={"limit": 64, "pairs": pairs})
    change(run / "baseline-sleb.json", baseline=evil)
    page = page_of(run)
    assert not [a for _, a in page.elements if a.get("id") == "x"]
    assert len(page.tagged("script")) == 2
    assert "<b id='x'>" in page.text


def test_a_large_model_stays_under_three_megabytes(tmp_path):
    run = write_run(tmp_path / "run", n=126, m=30)
    write_report(run)
    assert (run / "report.html").stat().st_size < 3e6


# parts --------------------------------------------------------------------------------


@parametrize(
    "low, high, log, expected",
    [
        (0.0, 1.0, False, ["0", "0.25", "0.5", "0.75", "1"]),
        (-0.02, 0.03, False, ["−0.02", "0", "0.02"]),
        (0.5, 20.0, True, ["0.4", "0.9", "2", "5", "10", "20"]),
        (2e5, 9e5, False, ["200,000", "400,000", "600,000", "800,000"]),
    ],
)
def test_ticks_are_round_and_differ(low, high, log, expected):
    scale = span([low, high], 0.0, 100.0, log=log)
    assert [tick_text(tick) for tick in scale.ticks()] == expected
    assert all(0 <= scale(t) <= 100 for t in scale.ticks())


def test_a_scale_of_one_value_or_none_is_still_a_scale():
    for values in ([2.0], [0.0, 0.0], [], [float("nan")]):
        scale = span(values, 0.0, 100.0)
        assert scale.low < scale.high
        assert len(scale.ticks()) >= 2


def test_the_block_axis_of_a_deep_model_has_few_numbers():
    assert [len(block_ticks(n)) for n in (1, 30, 901, 4096)] == [1, 6, 5, 9]


def test_code_is_marked_and_signs_are_minus_signs():
    assert code("a `b-1` <c> -1.5 (-2 to 3) x-1 --remove 4") == (
        "a <code>b-1</code> &lt;c&gt; −1.5 (−2 to 3) x-1 --remove 4"
    )


def compared(*runs, out):
    warnings = write_comparison([(r, r) for r in runs], out)
    return Page(out.read_text()), warnings


def test_two_energies_on_one_text_differ_in_nothing_else(run, tmp_path):
    other = write_run(tmp_path / "other", energy="fisher", extras=False)
    page, warnings = compared(run, other, out=tmp_path / "c.html")
    assert warnings == []
    assert "They differ in energy; everything else is the same." in page.text
    assert len(page.classed("mark")) == 3 * 1 + 3 * (2 + 1)
    # The charts compare what is shipped, in colours other than the original's.
    assert page.text.count("KL (final model, unseen text), nats/token") == 3 * 2
    assert "0.9000 ± 0.0100" in page.text.partition("What quality costs")[2]
    tones = re.findall(
        r"\.tone-\d { --tone: (.*?); }", (tmp_path / "c.html").read_text()
    )
    assert len({*tones, "var(--original)"}) == 7


def test_runs_that_are_not_comparable_are_named(run, tmp_path):
    model = write_run(tmp_path / "m", model="b-model", n=16, m=4, extras=False)
    text = write_run(tmp_path / "t", seed=1, extras=False)
    (text / "candidates.json").unlink()
    page, warnings = compared(run, model, text, out=tmp_path / "c.html")
    said = " ".join(warnings)
    assert "different models" in said
    assert "different tokens" in said
    assert "not run" in page.text
    assert all(w in page.text for w in warnings)


def sizes(out):
    """Return the cells of the table of models and sizes, row by row."""
    table = out.read_text().partition('aria-label="Models and sizes">\n<thead>')[2]
    rows = re.findall(
        r"<tr><th scope=.row.*?</tr>", table.partition("</table>")[0], re.S
    )
    return [[Page(c).text for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]


def test_models_and_sizes_are_rows_of_one_table(run, tmp_path):
    out = tmp_path / "c.html"
    other = write_run(tmp_path / "other", model="b-model", n=16, m=4, extras=False)
    compared(run, other, out=out)
    rows = sizes(out)
    assert [row[:4] for row in rows] == [
        ["run", "a-model", "3 of 12", "14.00 → 11.00 (−21.4 %)"],
        ["run", "a-model", "2 of 12", "14.00 → 12.00 (−14.3 %)"],
        ["other", "b-model", "4 of 16", "18.00 → 14.00 (−22.2 %)"],
    ]
    assert [row[7] for row in rows] == [
        f"{kl}000 ± 0.0100" for kl in ("0.9", "0.6", "1.2")
    ]
    # A folder of one removal stands for that removal; a range has none of its own.
    write_comparison([(run, run / "remove-2"), (other, other)], tmp_path / "d.html")
    assert [row[2] for row in sizes(tmp_path / "d.html")] == ["2 of 12", "4 of 16"]
    (other / "candidates.json").unlink()
    shutil.rmtree(other / "model")
    write_comparison([(run, run), (other, other)], tmp_path / "e.html")
    assert [row[2] for row in sizes(tmp_path / "e.html")] == [
        "3 of 12",
        "2 of 12",
        "not run",
    ]


def test_a_comparison_is_replaced_with_leave_only(run, tmp_path):
    out = tmp_path / "c.html"
    places = [(run, run), (run, run / "remove-2")]
    write_comparison(places, out)
    with refuses("already exists", OutputExistsError):
        write_comparison(places, out)
    assert "remove-2" in out.read_text()


def test_the_command_line_compares_folders(
    run, tmp_path, monkeypatch, answer, refusal, typed
):
    monkeypatch.chdir(tmp_path)
    assert answer("report", run, run / "remove-2").comparison == "compare.html"
    for words, line in (
        ((run, run, "--remove", "7"), f"solve {run} --remove 7"),
        ((run, "--out", "x.html"), "--out"),
    ):
        assert line in refusal("report", *words)
    assert "report.html" in typed("report", run).out
    # A folder of a removal needs no --remove, even if the run has none.
    config = load_json(run / "run.json").config
    change(run / "run.json", config={**config, "remove": ""})
    works("report", run / "remove-2")
    monkeypatch.chdir(run / "remove-2")
    assert "2 of its 12 blocks" in Path("report.md").read_text()
    works("report", ".", ".")
