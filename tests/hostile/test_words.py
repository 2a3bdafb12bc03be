"""Invalid words and numbers are refused before a model, a text or a run is read.

The models, run folders and checkpoints of these commands do not exist, and their text is a pipe
without a writer: a command that reads any of them first has another message, or hangs.
"""

import dataclasses
import math
import os

import numpy as np
import pydantic
import pytest
from arena import Arena, Row, parametrised, tried
from damage import written

import isingcut
from isingcut.options.declaration import flag, from_yaml, parse_yaml
from isingcut.runs.folder import refuse_foreign
from shared import HealConfig, IsingcutError, RunConfig, cells, parametrize, refuses

RUN = "run gone --out new --calibration {here}/pipe"
HEAL = "heal gone --teacher gone --out new --text {here}/pipe"
LONG = "9" * 5000


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """An arena without a model or a run: a home folder, and a pipe."""
    here = tmp_path / "here"
    (here / "home").mkdir(parents=True)
    os.mkfifo(here / "pipe")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return Arena(here)


def numbers(kind):
    """Yield the options of a class that are numbers, with their bounds."""
    schemas = pydantic.TypeAdapter(kind).json_schema()["properties"]
    for f in dataclasses.fields(kind):
        schema = schemas[f.name]
        schema = schema.get("anyOf", [schema])[0]
        if schema["type"] in ("integer", "number"):
            low = schema.get("minimum", -math.inf)
            above = schema.get("exclusiveMinimum", -math.inf)
            yield f, low, above, schema["maximum"], schema["type"] == "integer"


@parametrize("kind", [RunConfig, HealConfig])
def test_every_number_has_both_ends(kind):
    for f, low, above, high, _ in numbers(kind):
        assert max(low, above) >= 0, f.name
        assert high <= 2**32, f.name


# Words after a command :: expected line. Some are spellings of whole numbers that Python reads and
# YAML does not.
WORDS = r"""
--remove two :: --remove: cannot read 'two' as a removal
--budget zorp=5 :: --budget: .*unknown quantity 'zorp'; known: params, bytes, kv, latency
--remove 2 --budget file=9MB :: --budget file=9MB chooses the blocks .*; omit --remove
--keep 1,2 --must-remove 2-4 :: --keep and --must-remove both name block 2
--remove 2 --compare-energies fisher,zorp :: unknown energy 'zorp'
--remove 2 --compare-energies auto :: 'auto' lets a run choose; here, name one energy
--effort zorp :: --effort: 'zorp': expected passes
--effort 1000001 :: --effort: .* of at most 1,000,000
--memory-limit much :: --memory-limit: memory 'much': expected a share
--device CUDA :: --device: must be auto, cpu, cuda, cuda:N or cuda:N,cuda:M; got 'CUDA'
--patch-share nan :: --patch-share must be a number, got 'nan'
--patch-share 1_0 :: --patch-share must be a number, got '1_0'
--calibration '' :: --calibration is empty
--samples '' :: --samples must be a whole number, got ''
--samples many :: --samples must be a whole number, got 'many'
--seed 1_0 :: --seed must be a whole number, got '1_0'
--seed ٣ :: --seed must be a whole number, got '٣'
--seed 007 :: --seed must be a whole number, got '007'
--tasks '' :: --tasks is empty; give a value, or remove the option
--tasks , :: --tasks is empty; give a value, or remove the option
--tasks arc_easy --data '' :: --data is empty; give a value, or remove the option
--zorp 1 :: (?i)no such option: --zorp
--remove 2 --config {here}/pipe :: pipe is a pipe; expected a regular file
--remove 2 --heal --healing heal.yaml :: --healing must be a section of the --config file
--remove 2 --heal --healing 'seed: [' :: --healing while parsing
--remove 2 --calibration ~/none.txt :: the calibration file '~/none.txt' does not
--remove 2 --calibration {here}/home :: home is a folder without data files
"""
HEALING = r"""
--method magic :: --method: must be one of full, lora or lora:RANK, none
--train 9 :: --train: '9': expected a time
--trainer t.yaml :: --trainer must be a section of the --config file, or .*; got 't.yaml'
--config /dev/zero :: /dev/zero is a device
--text '' :: --text is empty
--text none.txt :: the calibration file 'none.txt' does not exist
"""
OTHERS = r"""
solve gone --remove 2 --remove 1..1000000000 :: --remove: '1000000000' is too large
rank gone --random-states 5 :: --random-states must be 0 or at least 30
report gone --budget params=0% :: expected more than 0, got '0%'
energy gone --out new --budget file=9MB :: file=9MB is only for `isingcut run`
baseline zorp gone :: unknown baseline 'zorp'
excise gone --blocks three :: cannot read 'three' as block numbers
"""


def rows():
    """Return all rows: the tables above, and both ends of a few numbers."""
    lines = [(f"{RUN} {words}", line) for words, line in cells(WORDS)]
    lines += [(f"{HEAL} {words}", line) for words, line in cells(HEALING)]
    lines += cells(OTHERS)
    for kind, command in ((RunConfig, RUN), (HealConfig, HEAL)):
        # One whole number and one other, as all are checked alike.
        for f, low, above, high, whole in {
            row[-1]: row for row in numbers(kind)
        }.values():
            small = low - 1 if math.isfinite(low) else above
            large = high + 1 if whole else high * 2
            lines.append(
                (f"{command} {flag(f)}={small}", f"{flag(f)} must be (at least|above) ")
            )
            lines.append(
                (f"{command} {flag(f)}={large}", f"{flag(f)} must be at most ")
            )
    return [Row(command, command, line) for command, line in lines]


@parametrised(rows())
def test_words_are_checked_before_anything_is_read(nothing, row):
    nothing.try_row(row)


# Files of options --------------------------------------------------------------------------------

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
)
LINES = r"""
merge key :: <<: {remove: 2} :: unknown option '<<'
tag :: out: !!python/object/apply:os.system [true] :: not determine a constructor for the tag
a list :: - remove :: must have 'option: value' lines, got list
unknown :: remov: 2 :: unknown option 'remov'; did you mean 'remove'
stream true :: stream: true :: stream must be one of auto, on, off; got True
a flag in a word :: drop-mtp: maybe :: drop_mtp must be true or false, got 'maybe'
remove a list :: remove: [2, 3] :: o.yaml: remove: cannot read '2,3'
trust :: trust_remote_code: true :: cannot be set in a file; type --trust-remote-code
"""
FILES = [
    *cells(LINES),
    ("alias bomb", BOMB, "aliases .* are not supported"),
    ("deep", "keep: " + "[" * 20_000, "nested too deeply"),
    ("huge", "# " + "x" * 10**6, "has 1000002 bytes; expected at most 65536"),
    ("twice", "samples: 4\nsamples: 5", "'samples' appears twice"),
    ("twice by dash", "rank-samples: 4\nrank_samples: 5", "rank_samples appears twice"),
    ("tab", "remove:\n\t2", "not a readable YAML file"),
    ("not UTF-8", b"remove: \xff", "is not UTF-8"),
    (
        "samples of many digits",
        f"samples: {LONG}",
        "not a readable YAML file: Exceeds the limit",
    ),
    (
        "samples of 90 digits",
        "samples: " + "9" * 90,
        "at most 1000000, got a number of more than",
    ),
]


SECTIONS = [
    ("{trust_remote_code: true}", "--healing: the run itself sets trust_remote_code"),
    ("{learning_rate: 1}", "unknown option 'learning_rate'"),
    ("{trainer: [optim]}", "trainer must be a section"),
]
FILE_ROWS = [
    *(
        Row(f"run: {name}", f"{RUN} --config o.yaml", line, written("o.yaml", text))
        for name, text, line in FILES
    ),
    Row("heal: trust", f"{HEAL} --config o.yaml", "cannot be set in a file",
        written("o.yaml", "trust_remote_code: true")),
    *(
        Row(f"healing: {text}", f"{RUN} --remove 2 --heal --config o.yaml", line,
            written("o.yaml", f"healing: {text}"))
        for text, line in SECTIONS
    ),
    Row(
        "config in the home folder",
        f"{RUN} --config=~/o.yaml",
        "home/o.yaml: unknown option 'zorp'",
        written("home/o.yaml", "zorp: 1"),
    ),
]  # fmt: skip


@parametrised(FILE_ROWS)
def test_files_of_options_are_checked_before_anything_is_read(nothing, row):
    nothing.try_row(row)


def test_words_of_yaml_mean_what_they_say(tmp_path):
    file = tmp_path / "o.yaml"
    file.write_text("stream: on\nremove: 4..9\nquick: false\nmodel: no\n")
    found = from_yaml(RunConfig, file)
    assert found == {"stream": "on", "remove": "4..9", "quick": False, "model": "no"}
    # As in the options of an earlier run.
    file.write_text("tasks: ''\nkeep: []\n")
    assert from_yaml(RunConfig, file) == {"tasks": "", "keep": ""}
    for typed in ("0x10", "010"):
        file.write_text(f"samples: {typed}")
        with refuses(f"samples must be a whole number, got '{typed}'", IsingcutError):
            from_yaml(HealConfig, file)
    file.write_text("remove: 010")
    with refuses("cannot read '010' as a removal", IsingcutError):
        from_yaml(RunConfig, file)
    assert parse_yaml("learning_rate: 2e-5") == {"learning_rate": 2e-5}


@parametrize(
    "options, line",
    [
        (
            {"samples": 10**5000},
            r"(--|run: )samples must be at most .*more than 60 digits",
        ),
        (
            {"patch_share": 10**400},
            r"patch.share must be a number, got a number of more than 60 digits",
        ),
        ({"keep": range(3), "must_remove": np.array([2, 4])}, "both name block 2"),
        ({"states": True}, "states must be a whole number, got True"),
        ({"patch": False}, "patch must be text, got False"),
        (
            {"calibration": "a\0b"},
            "'a.x00b' is not a path: it contains a NUL byte",
        ),
        (
            {"calibration": "a\udc80"},
            r"(--|isingcut\.run: )calibration: must be UTF-8 text",
        ),
    ],
)
def test_python_is_checked_alike(nothing, options, line):
    with refuses(line, IsingcutError):
        isingcut.run(**{"model": "gone", "out": "new", "remove": 2, **options})
    with refuses(line, IsingcutError):
        isingcut.run(
            RunConfig(**{"model": "gone", "out": "new", "remove": "2", **options})
        )


# What the model's configuration rules out ---------------------------------------------------------

EARLY = r"""
--remove 6 :: --remove must be from 1 to 5 for this model of 6 blocks, got 6
--remove 2..9 :: --remove must be from 1 to 5 for this model of 6 blocks, got 9
--remove mamba=1 :: no block is of kind 'mamba'; this model has attention\+mlp \(6\)
--remove attention+mlp=6 :: --remove must be from 1 to 5 for this model
--remove 2 --must-remove 4-6 :: cannot drop block 6: blocks are numbered 0 to 5
--remove 5 --keep 0,1 :: these conflict: .*keep.*nearest possible number of blocks is 4$
--budget params=99% :: the largest possible is params=\d+(\.\d)?%
--remove 1 --budget params=50% :: the largest possible is params=\d+(\.\d)?%
--units sublayers --budget params=20% :: as zeros here: give --units blocks
--remove 2 --length 200 :: --length 200 is more than this model's 128 positions; give --length 128
"""


@parametrize("words, line", cells(EARLY))
def test_the_configuration_is_checked_before_weights_are_loaded(
    arena, words, line, fails
):

    fails("isingcut.models.load.load", AssertionError("the weights were loaded"))
    short = "" if "--length" in words else "--length 16 "
    command = "run {model} --out new --calibration {text} " + short + words
    arena.refuses(command, line)


def test_blocks_kept_are_checked_without_a_removal(arena):
    command = "energy {model} --out new --calibration {text} --length 16 --keep 0,17"
    arena.refuses(command, "cannot keep block 17: blocks are numbered 0 to 5")


def test_the_largest_budget_can_be_had(arena):
    """The largest budget that the refusal names is accepted."""
    said = arena.refuses(
        "solve {run} --budget params=30%,kv=99%", "kv=83.3%$", stdin=""
    )
    assert said == ""
    arena.works("solve {run} --budget params=30%,kv=83.3%", "run/*")


# The first day ------------------------------------------------------------------------------------

FINE = [
    Row("a kind as inspect prints it", "solve {run} --remove attention+mlp=2", code=0,
        makes=("run/*",)),
    Row("a run in the home folder", "solve ~/run --remove 1", code=0, makes=("home/run/*",),
        prepare=lambda a: (a.run).rename(a.home / "run")),
    Row("a plan for a budget", "plan {model} --budget params=30% --length 16", code=0,
        line=r"a run with refined takes "),
    Row("a comparison in the home folder", "report {run} {run} --out ~/two.html", code=0,
        makes=("home/two.html",)),
    Row("a model in the home folder", "inspect ~/model", code=0,
        prepare=lambda a: (a.model).rename(a.home / "model")),
]  # fmt: skip


test_what_can_be_typed = tried(FINE)


def test_a_path_of_python_may_begin_at_home(arena):
    arena.run.rename(arena.home / "run")
    assert isingcut.open_run("~/run").path == arena.home / "run"
    with refuses("already exists and is not an isingcut run", IsingcutError):
        refuse_foreign(RunConfig(model="m", out="~"))
