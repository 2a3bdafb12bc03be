"""Randomly damaged files: every command exits with 0 or 2, and no file of the user changes.

The examples are the same at every run. `ISINGCUT_FUZZ=5000 pytest tests/hostile/test_fuzz.py`
draws that many new ones for each test; a failure found this way is to become a row of a table.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
from arena import call, make_arena
from damage import WEIGHTS, changed, edited, header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_files import record

from shared import module_fixture, parametrize, snapshot

MANY = int(os.environ.get("ISINGCUT_FUZZ", "0"))
# Prefixes of paths that a successful command may write or replace.
MADE = ("home/cache/", "run/remove-", "run/report.", "run/run.json", "run/model", "new")

NAMES = st.sampled_from(
    ["", "a", "[", "../../x", "\x00", "\ud800", "ü" * 300, "1e9", "inf", "2"]
)
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        7,
        2**31,
        2**63,
        -(2**63),
        10**40,
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
    ]
)
LEAVES = st.none() | st.booleans() | NUMBERS | NAMES
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=6,
)
# Functions from the old value in a document to the new one.
CHANGES = st.one_of(
    JSON.map(lambda new: lambda old: new),
    NUMBERS.map(lambda new: lambda old: old * new if isinstance(old, int) else new),
    st.sampled_from([lambda old: [old], lambda old: {"x": old}, str]),
)


@st.composite
def edits(draw):
    """Draw up to three changes of a JSON document: replaced values, removed keys, added keys."""
    picks = draw(
        st.lists(
            st.tuples(
                st.integers(0, 10**6), CHANGES, st.sampled_from(["put", "drop", "add"])
            ),
            min_size=1,
            max_size=3,
        )
    )

    def edit(document):
        for where, change, how in picks:
            homes = list(_homes(document))
            if not homes:
                return change(document)
            home, key = homes[where % len(homes)]
            if how == "drop":
                del home[key]
            elif how == "add" and isinstance(home, dict):
                home[f"{key}x"] = change(home[key])
            else:
                home[key] = change(home[key])
        return document

    return edit


def _homes(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _homes(value[key])


@st.composite
def damage(draw, most):
    """Draw a function that truncates data or flips bytes, within the first ``most`` bytes."""
    cut = draw(st.booleans())
    at = draw(st.integers(0, most))
    bits = draw(
        st.lists(st.tuples(st.integers(0, most), st.integers(1, 255)), min_size=1)
    )

    def spoil(data):
        if cut:
            return data[: at % max(1, len(data))]
        held = bytearray(data)
        for where, mask in bits:
            held[where % len(held)] ^= mask
        return bytes(held)

    return spoil


@module_fixture
def survives(world):
    """Function that damages a copy of the world and runs a command. It must exit with 0 or 2,
    without a traceback, and change no file of the user."""

    def survive(command, *steps, codes=(0, 2)):
        with (
            tempfile.TemporaryDirectory() as folder,
            pytest.MonkeyPatch.context() as patch,
        ):
            arena = make_arena(world, Path(folder), patch)
            for step in steps:
                step(arena)
            before = snapshot(arena.here)
            code, out, err = call(command.split(), 120, 2500)
            told = f"isingcut {command}\nexit {code}\n{out[-1500:]}\n{err[-6000:]}"
            assert code in codes, told
            assert "Traceback" not in out + err, told
            assert "internal error" not in (out + err).lower(), told
            after = snapshot(arena.here)
            names = (before.keys() | after.keys()) - {"home", "home/cache"}
            allowed = MADE if code == 0 else MADE[:1]
            left = {
                n
                for n in names
                if before.get(n) != after.get(n) and not n.startswith(allowed)
            }
            assert not left, f"changed or made: {sorted(left)}\n{told}"

    return survive


def fuzzed(examples):
    """Return settings for a few fixed examples, or for many new ones."""
    return settings(
        max_examples=MANY or examples,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


MODEL_FILES = ["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json"]
LOOK = "inspect model"
ENERGY = "energy model --calibration text.txt --samples 2 --length 16 --energy fisher --out new"


@fuzzed(15)
@given(edits(), st.sampled_from(MODEL_FILES), st.sampled_from([LOOK, LOOK, ENERGY]))
def test_model_files(survives, edit, name, command):
    survives(command, edited(f"model/{name}", edit))


LENGTHS = st.sampled_from(
    [lambda n: n, lambda n: n, lambda n: n + 1, lambda n: -1, lambda n: n * 9]
)


@fuzzed(15)
@given(
    st.builds(lambda edit, length: header(edit, WEIGHTS, length), edits(), LENGTHS)
    | damage(4000).map(lambda spoil: changed(WEIGHTS, spoil)),
    st.sampled_from([LOOK, ENERGY, "excise run --blocks 0,1 --overwrite"]),
)
def test_safetensors(survives, damaged, command):
    survives(command, damaged)


RANK, REPORT, SOLVE, EXCISE, EVALUATE = (
    f"{verb} run" for verb in ("rank", "report", "solve", "excise", "evaluate")
)
STAGES = {
    "candidates.json": [RANK, REPORT, EXCISE],
    "spectrum.json": [SOLVE, RANK, REPORT],
    "evaluation.json": [REPORT, EVALUATE],
    "run.json": [SOLVE, RANK, REPORT, EXCISE, EVALUATE],
    "calibration.safetensors": [RANK, REPORT],
    "hamiltonian.safetensors": [SOLVE, f"{SOLVE} --remove 3", RANK, REPORT],
}
PAIRS = [(name, command) for name, commands in STAGES.items() for command in commands]


def within(edit):
    """Change the JSON document in the header of a stage file."""

    def change(content):
        document = edit(json.loads(content["__metadata__"]["isingcut"]))
        content["__metadata__"]["isingcut"] = json.dumps(document)

    return change


@fuzzed(30)
@given(st.sampled_from(PAIRS), edits(), damage(2000), st.integers(0, 4))
def test_stage_files(survives, which, edit, spoil, how):
    name, command = which
    file = f"run/{name}"
    if not how:
        damaged = changed(file, spoil)
    elif name.endswith(".json"):
        damaged = edited(file, edit)
    else:
        damaged = header(edit if how == 1 else within(edit), file)
    survives(command, damaged, lambda arena: record(arena, name))


@parametrize("command", [LOOK, ENERGY, *sorted({command for _, command in PAIRS})])
def test_unharmed_files_are_accepted(survives, command):
    steps = [lambda arena, name=name: record(arena, name) for name in STAGES]
    survives(command, *steps, codes=(0,))
