"""The report in a headless Chromium: it draws, responds, fits, and works without a mouse."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from isingcut.ising.hamiltonian import Hamiltonian
from run_files import change, text_scores, write_comparison, write_report, write_run
from shared import load_json, module_fixture, parametrize

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
# By default Chromium contacts update and name servers; a test machine has no network.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@module_fixture
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with sync_playwright() as p:
        if found is None and not Path(p.chromium.executable_path).exists():
            install = [sys.executable, "-m", "playwright", "install", "chromium"]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(
                    f"no Chromium here, and none can be installed: {done.stderr[-200:]}"
                )
        running = p.chromium.launch(executable_path=found, args=QUIET)
        yield running
        running.close()


@module_fixture
def run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("pages") / "run")
    write_report(path)
    return path


@module_fixture
def files(run):
    """The pages to test: a run, one of 96 blocks, and a comparison of three."""
    large = write_run(run.parent / "large", n=96, m=20, model="b-model", extras=False)
    # Five models without a speed: the narrowest columns.
    found = load_json(large / "evaluation.json")
    for side in (found.before, found.after):
        del side["decode_tokens_per_second"]
    also = {**text_scores(24.0), "kl": 0.5, "kl_se": 0.01}
    further = {"cut": also, "patched": also, "gguf": {**also, "bytes": 9}}
    change(large / "evaluation.json", **found, **further, last="healed")
    write_report(large)
    other = write_run(run.parent / "other", energy="fisher", extras=False)
    several = run.parent / "compare.html"
    write_comparison([(run, run), (other, other), (large, large)], several)
    return {
        "run": run / "report.html",
        "large": large / "report.html",
        "several": several,
    }


@pytest.fixture
def show(browser, files):
    """Function that opens a page from disk; its messages, errors and requests fail the test."""
    contexts = []
    complaints = []

    def opened(name, size=DESK, **options):
        context = browser.new_context(viewport=size, **options)
        # Shared machines are slow: only a page that never responds may reach the limit.
        context.set_default_timeout(180_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(files[name].as_uri())
        page.on("request", lambda r: complaints.append(f"asks for {r.url}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@parametrize("name", ["run", "large", "several"])
@parametrize("size", [DESK, PHONE], ids=["1280", "390"])
def test_nothing_scrolls_sideways(show, name, size):
    page = show(name, size)
    assert overflow(page) <= 0
    page.evaluate(
        "document.querySelectorAll('details').forEach(d => { d.open = true })"
    )
    assert overflow(page) <= 0
    # Content too wide for a phone scrolls in a box of its own, which the keyboard can reach.
    boxes = page.eval_on_selector_all(
        ".scroll",
        "all => all.filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length",
    )
    assert boxes == 0


def test_no_word_of_a_table_is_broken(show):
    lines = show("large", PHONE).eval_on_selector_all(
        ".scores td",
        """all => all.filter(e => e.innerText.trim() == 'not measured').map(e => {
            const range = document.createRange();
            const words = e.firstChild;
            range.selectNodeContents(e.querySelector(".pm") ? words.firstChild : words);
            return new Set([...range.getClientRects()].map(box => box.y)).size;
        })""",
    )
    assert lines == [2, 2]


def test_every_figure_is_drawn(show):
    page = show("run")
    flat = page.eval_on_selector_all(
        "figure .mark .shape",
        "all => all.map(e => e.getBoundingClientRect())"
        ".filter(box => box.width <= 2 || box.height <= 1)",
    )
    assert flat == []
    captions = page.eval_on_selector_all(
        "figure", "all => all.map(e => e.querySelector('figcaption').innerText.trim())"
    )
    assert len(captions) == 12
    assert all(captions)


def test_the_block_axis_is_one_line_through_map_fields_and_couplings(show):
    page = show("run")
    boxes = [
        page.locator(s).first.bounding_box()
        for s in ("#map td[data-axis]", ".fields", ".heat", "#rivals td[data-axis]")
    ]
    for box in boxes[1:]:
        assert box["x"] == pytest.approx(boxes[0]["x"], abs=1.5)
        assert box["width"] == pytest.approx(boxes[0]["width"], abs=1.5)


def test_pointing_gives_values(show, run):
    page = show("run")
    tip = page.locator(".tip")
    assert tip.is_hidden()
    chosen = load_json(run / "candidates.json").chosen
    page.locator("#scatter-pairwise .mark.chosen").hover()
    assert f"measured KL {chosen['kl']:.4f}" in tip.inner_text()
    assert f"energy {chosen['energy']:.4g}" in tip.inner_text()
    energy = Hamiltonian.load(run / "hamiltonian.safetensors")
    heat = page.locator(".heat")
    box = heat.bounding_box()
    heat.hover(position={"x": box["width"] * 7.5 / 12, "y": box["height"] * 2.5 / 12})
    assert "blocks 7 and 2" in tip.inner_text()
    assert f"J = {energy.J[2, 7]:.4g}".replace("-", "−") in tip.inner_text()
    fields = page.locator(".fields")
    fields.hover(position={"x": fields.bounding_box()["width"] * 4.5 / 12, "y": 40})
    assert f"h = {energy.h[4]:.4g}" in tip.inner_text()
    cell = page.locator("#map tr.chosen td[data-axis]")
    cell.hover(
        position={
            "x": cell.bounding_box()["width"] * (chosen.removed[0] + 0.5) / 12,
            "y": 9,
        }
    )
    assert "removed in state" in tip.inner_text()
    page.locator("h1").hover()
    assert tip.is_hidden()


def outlined(page):
    """Return the pairs of blocks that the heat map outlines, as column and row."""
    return set(re.findall(r"M(\d+) (\d+)", page.locator(".picks").get_attribute("d")))


def pairs(removed):
    return {(str(i), str(j)) for i in removed for j in removed if i != j}


def test_a_click_on_a_state_marks_it_in_every_figure(show, run):
    page = show("run")
    ranked = load_json(run / "candidates.json")
    state = ranked.candidates[2].removed
    chosen = ranked.chosen.removed
    assert outlined(page) == pairs(chosen)
    row = page.locator("#map tbody tr").nth(2)
    row.click()
    assert page.locator("#map button[aria-pressed=true]").count() == 1
    assert page.locator("#scatter-pairwise .mark.on").count() == 1
    assert outlined(page) == pairs(state)
    row.click()
    assert page.locator(".mark.on").count() == 0
    assert outlined(page) == pairs(chosen)
    page.locator("#scatter-pairwise .mark.random").first.click(force=True)
    assert page.locator(".mark.on").count() == 2


def test_the_keyboard_reaches_every_state(show, run):
    page = show("run")
    live = "document.querySelector('#live').textContent"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#map tbody button").first.focus()
    for key in ("Tab", "Enter"):
        page.keyboard.press(key)
    removed = load_json(run / "candidates.json").candidates[1].removed
    assert page.evaluate(live) == f"state 1 removes {', '.join(map(str, removed))}"
    page.keyboard.press("Escape")
    assert page.evaluate(live) == ""
    assert page.locator("button[aria-pressed=true]").count() == 0


def violations(page, **options):
    """Return the violations that axe calls serious or critical: rule, element and remedy."""
    found = Axe().run(page, options={"resultTypes": ["violations"], **options})
    return [
        (v["id"], str(node["target"]), str(node.get("failureSummary")))
        for v in found.response["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def test_axe_finds_no_serious_violation(show):
    page = show("run", color_scheme="light")
    # Three tables only, as all are made alike and axe takes long over many rows.
    for one in ("#couplings", "#scatter-pairwise", "#provenance"):
        page.evaluate(f"document.querySelector('{one} details').open = true")
    page.locator("#map tbody tr").nth(1).click()
    assert violations(page) == []
    assert violations(show("several", color_scheme="light")) == []


@parametrize("name", ["run", "several"])
def test_axe_finds_enough_contrast_in_the_dark(show, name):
    page = show(name, color_scheme="dark")
    assert (
        violations(page, runOnly={"type": "rule", "values": ["color-contrast"]}) == []
    )


def test_light_and_dark_follow_the_system(show):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = show("run", color_scheme="light")
    dark = show("run", color_scheme="dark")
    assert light.evaluate(colour) != dark.evaluate(colour)
    dark.emulate_media(media="print")
    assert dark.evaluate(colour) == light.evaluate(colour)
    assert dark.locator(".bar").is_hidden()


def test_without_scripts_all_figures_are_there(show):
    page = show("run", java_script_enabled=False)
    assert page.locator("#scatter-pairwise .mark").count() == 50
    assert page.locator(".heat").is_visible()


def test_wide_figures_scroll_together(show):
    page = show("large", PHONE)
    page.evaluate("document.querySelector('#couplings .synced').scrollLeft = 40")
    page.wait_for_function(
        "document.querySelector('#fields .synced').scrollLeft === 40"
    )
    assert page.evaluate("document.querySelector('#map .synced').scrollLeft") == 40
