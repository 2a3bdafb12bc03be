"""No file of the user is replaced, with `--overwrite` or without; files of isingcut are."""

import os
import shutil
from hashlib import sha256

import pytest
from arena import Row, tried
from damage import changed, linked, other_model, written

import isingcut
from isingcut.files.ownership import check_output
from isingcut.runs.folder import read_by
from shared import (
    InputError,
    OutputExistsError,
    RunConfig,
    cells,
    load_json,
    parametrize,
    refuses,
    save_json,
    snapshot,
)

STAYS = r"is not replaced: .*--overwrite replaces only files of isingcut"
FOREIGN = r"already exists and is not an isingcut run; nothing was written"
OF_SOURCE = r"the output .* (is|contains|lies in) .*, an input of this command; nothing was written"


def own_model(arena):
    """Put a model of the user in the place of the run's own."""
    shutil.rmtree(arena.run / "model")
    shutil.copytree(arena.model, arena.run / "model")


def model_inside(arena):
    (arena.here / "proj").mkdir()
    shutil.copytree(arena.model, arena.here / "proj/model")


# Refused places of a run folder, which `run` and `energy` open alike: `--out` as typed,
# preparation, expected line.
PLACES = {
    "a home folder": ("{home}", None, FOREIGN),
    "a link to a home": ("{here}/link", linked("link", "home"), FOREIGN),
    "a hidden file": ("{here}/full", written("full/.hidden"), FOREIGN),
    "a file": ("{here}/file", written("file"), "is a file; choose a folder"),
    "the model": ("{model}", None, OF_SOURCE),
    "inside the model": ("{model}/out", None, OF_SOURCE),
    "around the model": ("{here}", None, OF_SOURCE),
    "a link to the model": ("{here}/link", linked("link", "model"), OF_SOURCE),
    "the text": ("{text}", None, OF_SOURCE),
    "a loop of links": ("{here}/link/run", linked("link", "link"), "cannot write"),
}
RUNS = [
    Row(
        f"{name}{flag}",
        f"energy {{model}} --calibration {{text}} --length 16 --out {place}{flag}",
        line,
        prepare or (lambda arena: None),
    )
    for name, (place, prepare, line) in PLACES.items()
    for flag in ("", " --overwrite")
]
RUNS += [
    Row(
        f"a model in the folder it would be replaced in{flag}",
        f"run proj/model --remove 2 --calibration {{text}} --length 16 --out proj{flag}",
        OF_SOURCE,
        model_inside,
    )
    for flag in ("", " --overwrite")
]

EXCISE = "excise {run} --blocks 0,1 --overwrite"
FOREIGN_FILE = "was not written by this run and is not replaced"
OVER = "report {run} {run} --out %s --overwrite"
SCORES = "evaluate {run}/model --original {model} --tasks piqa --out %s --overwrite"
EDITED = "config.json in it was changed after the run wrote it"
# The options of the arena's run.
AGAIN = (
    "--remove 2 --calibration text.txt --length 16 --samples 3 --rank-samples 3 "
    "--report-samples 3 --dtype float32 --random-states 30 --patch-tokens 1000 --patch-share 0"
)
BEGUN = f"run model --out {{here}}/begun {AGAIN}"


def begun(arena):
    """Write an unfinished run with a report of the user's own."""
    shutil.copytree(arena.run, arena.here / "begun")
    written("begun/report.md")(arena)
    (arena.here / "begun/candidates.json").unlink()


# Files that a command on a run may not replace.
STAGES = [
    ("a foreign model", EXCISE, r"its \S+ was changed", own_model),
    ("a file beside the weights", EXCISE, STAYS, written("run/model/notes.txt")),
    ("an edited model card", EXCISE, STAYS, written("run/model/README.md")),
    ("an edited config of the cut", EXCISE, EDITED, written("run/model/config.json")),
    ("a link in the cut", EXCISE, STAYS, linked("run/model/link", "home")),
    ("a spectrum of another hand", "solve {run} --remove 3 --overwrite", FOREIGN_FILE,
     written("run/remove-3/spectrum.json")),
    ("a baseline of another hand", "baseline random {run} --overwrite", FOREIGN_FILE,
     written("run/baseline-random.json")),
    *((f"the user's own report.{form}", "report {run}", STAYS, written(f"run/report.{form}", text))
      for form, text in (("md", "mine"), ("html", "<p>mine"), ("json", '{"mine": 1}'))),
    *((f"an edited report.{form}", "report {run}", "changed after isingcut wrote it",
       changed(f"run/report.{form}", lambda b: b.replace(b"model", b"modem", 1)))
      for form in ("md", "html", "json")),
    ("a report that is a link", "report {run}", STAYS,
     linked("run/report.md", "home/diary.txt")),
    ("the user's own report, found before anything is measured", BEGUN, STAYS, begun),
    ("a comparison over the user's page", OVER % "{here}/c.html", STAYS, written("c.html")),
    ("a comparison over the text", OVER % "{text}", STAYS),
    ("a comparison over a home folder", OVER % "{home}", STAYS),
    ("a comparison over a link", OVER % "{here}/c.html", STAYS, linked("c.html", "home/diary.txt")),
    ("benchmarks into the original", SCORES % "{model}/config.json", OF_SOURCE),
    ("benchmarks into the cut", SCORES % "{run}/model/README.md", OF_SOURCE),
    ("benchmarks into a diary", SCORES % "{home}/diary.txt", STAYS),
]  # fmt: skip
# Files whose damage the recorded hash reveals, and the commands that read them.
READERS = """
hamiltonian.safetensors :: solve {run}
hamiltonian.safetensors :: rank {run} --random-states 31 --overwrite
hamiltonian.safetensors :: report {run}
calibration.safetensors :: rank {run} --random-states 31 --overwrite
calibration.safetensors :: baseline random {run}
calibration.safetensors :: run model --out run AGAIN
spectrum.json :: solve {run}
spectrum.json :: rank {run}
spectrum.json :: report {run}
candidates.json :: rank {run}
candidates.json :: excise {run}
candidates.json :: report {run}
evaluation.json :: evaluate {run}
evaluation.json :: report {run}
"""


def flip(name):
    """Flip a bit: of a digit in the middle of a JSON file (still valid), else near the end."""

    def change(content):
        digits = [i for i, b in enumerate(content) if chr(b) in "12345678"]
        content[digits[len(digits) // 2] if name.endswith("json") else -3] ^= 1

    return changed(f"run/{name}", change)


CHANGED = [
    Row(
        f"a changed {name}: {command}",
        command.replace("AGAIN", AGAIN),
        "was changed or damaged after the run",
        flip(name),
    )
    for name, command in cells(READERS)
]
# Importing lm-evaluation-harness takes seconds.
ROWS = [*RUNS, *(Row(*row, seconds=60) for row in STAGES), *CHANGED]


test_nothing_of_the_users_is_replaced = tried(ROWS)


def test_other_blocks_without_leave_leave_the_model_alone(arena):
    made = ("run/run.json", "run/remove-2-blocks-0-1", "run/remove-2-blocks-0-1/*")
    arena.works("excise {run} --blocks 0,1", *made)


def test_a_model_card_may_be_edited(arena):
    written("run/model/README.md")(arena)
    arena.works("excise {run}")


def test_what_isingcut_wrote_is_replaced(arena):
    arena.works("excise {run} --blocks 0,1 --overwrite", "run/*")
    assert load_json(arena.run / "model/isingcut.json").removed == [0, 1]
    arena.works("report {run}", "run/report*")
    for flag in ("", "--overwrite"):
        arena.works(f"report {{run}} {{run}} --out c.html {flag}", "c.html")


@parametrize(
    "place",
    ["model", "home", "run", ".", "run/model/inside", "model/inside", "text.txt"],
)
def test_save_replaces_nothing_of_the_users(arena, place):
    run = isingcut.open_run("run")
    before = snapshot(arena.here)
    with pytest.raises((InputError, OutputExistsError)):
        run.save(place, blocks=[0, 1], overwrite=True)
    assert snapshot(arena.here) == before


def test_save_replaces_what_it_wrote(arena):
    run = isingcut.open_run("run")
    run.save("mine", blocks=[0, 1])
    with refuses(r"already exists.*overwrite=True", OutputExistsError):
        run.save("mine", blocks=[0, 2])
    run.save("mine", blocks=[0, 2], overwrite=True)
    assert load_json(arena.here / "mine/isingcut.json").removed == [0, 2]


def test_a_hard_link_to_a_source_is_that_source(arena):
    os.link(arena.text, arena.here / "same.html")
    with refuses(OF_SOURCE):
        check_output(arena.here / "same.html", overwrite=True, sources=[arena.text])


def test_every_file_of_questions_is_an_input(arena):
    names = {"a.jsonl", "b.jsonl"}
    for name in names:
        (arena.here / name).touch()
    found = read_by(RunConfig(model="model", tasks="a.jsonl, arc_easy, b.jsonl"))
    assert names <= {path.name for path in found}


def test_another_model_may_replace_a_run_but_not_what_was_edited(arena):
    other_model(arena)
    command = f"run other --out run {AGAIN}"
    arena.refuses(command, "is a run of another model")
    written("run/model/README.md")(arena)
    names = ("candidates.json", "hamiltonian.safetensors", "run.json", "spectrum.json")
    made = tuple(f"run/{name}" for name in names)
    line = "run/model is not replaced: README.md in it was changed"
    arena.refuses(f"{command} --overwrite", line, makes=made, seconds=60)


def test_a_forged_marker_opens_nothing(arena):
    """A marker whose hash is right is refused if its files are a list."""
    forged = {
        "format": "isingcut-output",
        "files": [],
        "sha256": sha256(b"[]").hexdigest(),
    }
    marker = arena.home / ".isingcut-output.json"
    save_json(marker, forged)
    run = isingcut.open_run("run")
    with refuses("was changed", OutputExistsError):
        run.save("home", blocks=[0, 1], overwrite=True)
    assert (arena.home / "diary.txt").read_text() == "mine\n"
