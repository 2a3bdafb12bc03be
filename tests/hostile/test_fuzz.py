"""Damaged files by the dozen: every command ends with 0 or 2, and the user's files are as before.

What is drawn is the same at every run. `ISINGCUT_FUZZ=5000 pytest tests/hostile/test_fuzz.py`
draws so many new examples for each test; what it finds is to become a row of a table.
"""

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from arena import call, copy_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isingcut.files.writing import file_sha256
from shared import snapshot

MANY = int(os.environ.get("ISINGCUT_FUZZ", "0"))
# What a command that ends well may write or replace.
MADE = ("home/cache/", "run/remove-", "run/report.", "run/run.json", "run/model", "new")

NAMES = st.sampled_from(["", "a", "[", "../../x", "\x00", "\ud800", "ü" * 300, "1e9", "inf", "2"])
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("inf"), float("nan")]
)
LEAVES = st.none() | st.booleans() | NUMBERS | NAMES
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
# How a value of a document changes: what it becomes, given what it was.
CHANGES = st.one_of(
    JSON.map(lambda new: lambda old: new),
    NUMBERS.map(lambda new: lambda old: old * new if isinstance(old, int) else new),
    st.sampled_from([lambda old: [old], lambda old: {"x": old}, str]),
)


@st.composite
def edits(draw):
    """A few changes at arbitrary places of a JSON document, some of them a name taken or given."""
    picks = draw(
        st.lists(
            st.tuples(st.integers(0, 10**6), CHANGES, st.sampled_from(["put", "drop", "add"])),
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
    """Flipped bytes, or a cut, within the first ``most`` bytes."""
    cut, at = draw(st.booleans()), draw(st.integers(0, most))
    bits = draw(st.lists(st.tuples(st.integers(0, most), st.integers(1, 255)), min_size=1))

    def spoil(data):
        if cut:
            return data[: at % max(1, len(data))]
        held = bytearray(data)
        for where, mask in bits:
            held[where % len(held)] ^= mask
        return bytes(held)

    return spoil


class Place:
    """A copy of the world for one example."""

    def __init__(self, here):
        self.here = here

    def edit(self, name, edit):
        """Change a JSON file."""
        path = self.here / name
        document = edit(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(document), encoding="utf-8")

    def spoil(self, name, spoil):
        """Change a file's bytes."""
        path = self.here / name
        path.write_bytes(spoil(path.read_bytes()))

    def header(self, name, edit, length):
        """Change the header of a safetensors file, and the length that it says the header has."""
        path = self.here / name
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        said = json.dumps(edit(json.loads(data[8:end]))).encode()
        path.write_bytes(struct.pack("<Q", length(len(said)) % 2**64) + said + data[end:])

    def record(self, name):
        """Let the run take a changed file for its own."""
        run = self.here / "run" / "run.json"
        document = json.loads(run.read_text(encoding="utf-8"))
        document["stages"][name]["sha256"] = file_sha256(self.here / "run" / name)
        run.write_text(json.dumps(document), encoding="utf-8")

    def survives(self, command, codes=(0, 2)):
        """The command ends with 0, or with 2 and one line, and nothing of the user's is changed."""
        before = snapshot(self.here)
        code, out, err = call(command.format(here=self.here).split(), 120, 2500)
        told = f"isingcut {command}\nexit {code}\n{out[-1500:]}\n{err[-6000:]}"
        assert code in codes, told
        assert "Traceback" not in out + err, told
        assert "internal error" not in (out + err).lower(), told
        after = snapshot(self.here)
        changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
        allowed = MADE if code == 0 else MADE[:1]
        left = {n for n in changed if not n.startswith(allowed) and n not in ("home", "home/cache")}
        assert not left, f"changed or made: {sorted(left)}\n{told}"


@pytest.fixture(scope="module")
def place(world):
    """Makes a `Place`, and takes it away with the context."""

    def make(run):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            run(Place(copy_world(world, Path(folder) / "here", patch)))

    return make


def fuzzed(examples):
    """Few examples, always the same; or many, new ones."""
    return settings(
        max_examples=MANY or examples,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


MODEL_FILES = ["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json"]
LOOK = "inspect {here}/model"
ENERGY = (
    "energy {here}/model --calibration {here}/text.txt --samples 2 --length 16 --energy fisher "
    "--out {here}/new"
)


@fuzzed(15)
@given(edits(), st.sampled_from(MODEL_FILES), st.sampled_from([LOOK, LOOK, ENERGY]))
def test_model_files(place, edit, name, command):
    def run(at):
        at.edit(f"model/{name}", edit)
        at.survives(command)

    place(run)


LENGTHS = st.sampled_from(
    [lambda n: n, lambda n: n, lambda n: n + 1, lambda n: -1, lambda n: n * 9]
)


@fuzzed(15)
@given(
    st.one_of(
        st.tuples(edits(), LENGTHS).map(
            lambda two: lambda at, name: at.header(name, two[0], two[1])
        ),
        damage(4000).map(lambda spoil: lambda at, name: at.spoil(name, spoil)),
    ),
    st.sampled_from([LOOK, ENERGY, "excise {here}/run --blocks 0,1 --overwrite"]),
)
def test_safetensors(place, change, command):
    def run(at):
        change(at, "model/model.safetensors")
        at.survives(command)

    place(run)


RANK, REPORT = "rank {here}/run", "report {here}/run"
SOLVE, MORE = "solve {here}/run", "solve {here}/run --remove 3"
EXCISE, EVALUATE = "excise {here}/run", "evaluate {here}/run"
STAGES = {
    "candidates.json": [RANK, REPORT, EXCISE],
    "spectrum.json": [SOLVE, RANK, REPORT],
    "evaluation.json": [REPORT, EVALUATE],
    "run.json": [SOLVE, RANK, REPORT, EXCISE, EVALUATE],
    "calibration.safetensors": [RANK, REPORT],
    "hamiltonian.safetensors": [SOLVE, MORE, RANK, REPORT],
}
PAIRS = [(name, command) for name, commands in STAGES.items() for command in commands]


def within(edit):
    """Change the document that the header of a stage file holds as a text."""

    def change(header):
        document = edit(json.loads(header["__metadata__"]["isingcut"]))
        header["__metadata__"]["isingcut"] = json.dumps(document)
        return header

    return change


@fuzzed(30)
@given(st.sampled_from(PAIRS), edits(), damage(2000), st.integers(0, 4))
def test_stage_files(place, which, edit, spoil, how):
    name, command = which

    def run(at):
        if not how:
            at.spoil(f"run/{name}", spoil)
        elif name.endswith(".json"):
            at.edit(f"run/{name}", edit)
        elif how == 1:
            at.header(f"run/{name}", edit, lambda n: n)
        else:
            at.header(f"run/{name}", within(edit), lambda n: n)
        if name != "run.json":
            at.record(name)
        at.survives(command)

    place(run)


@pytest.mark.parametrize(
    "command",
    [
        LOOK,
        ENERGY,
        *sorted({command for _, command in PAIRS}),
    ],
)
def test_unharmed_files_are_accepted(place, command):
    def run(at):
        for name in STAGES.keys() - {"run.json"}:
            at.record(name)
        at.survives(command, (0,))

    place(run)
