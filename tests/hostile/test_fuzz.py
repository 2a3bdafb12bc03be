"""Damaged files by the dozen: every command ends with 0 or 2, and the user's files are as before.

What is drawn is the same at every run. `ISINGCUT_FUZZ=5000 pytest tests/hostile/test_fuzz.py`
draws so many new examples for each test; what it finds is to become a row of a table.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arena import call
from gguf_files import info, named, pair, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from isingcut.files.outputs import file_sha256
from shared import leave_speed_out, snapshot

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
CHANGES: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    JSON.map(lambda new: lambda old: new),
    NUMBERS.map(lambda new: lambda old: old * new if isinstance(old, int) else new),
    st.sampled_from(
        [
            lambda old: [old],
            lambda old: {"x": old},
            str,
            lambda old: old * 2 if isinstance(old, str | list) else old,
            lambda old: old[:-1] if isinstance(old, str | list) else None,
            lambda old: -old if isinstance(old, int | float) else old,
        ]
    ),
)


@st.composite
def edits(draw: Any) -> Callable[[Any], Any]:
    """A few changes at arbitrary places of a JSON document, some of them a name taken or given."""
    picks = draw(
        st.lists(
            st.tuples(st.integers(0, 10**6), CHANGES, st.sampled_from(["put", "drop", "add"])),
            min_size=1,
            max_size=3,
        )
    )

    def edit(document: Any) -> Any:
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


def _homes(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _homes(value[key])


@st.composite
def damage(draw: Any, most: int) -> Callable[[bytes], bytes]:
    """Flipped bytes, a cut, or a stretch repeated, within the first ``most`` bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "repeat", "insert"]))
    at = draw(st.integers(0, most))
    bits = draw(st.lists(st.tuples(st.integers(0, most), st.integers(1, 255)), min_size=1))
    more = draw(st.binary(max_size=16))

    def spoil(data: bytes) -> bytes:
        if kind == "cut":
            return data[: at % max(1, len(data))]
        if kind == "repeat":
            return data[:at] + data[at : at + 64] + data[at:]
        if kind == "insert":
            return data[:at] + more + data[at:]
        held = bytearray(data)
        for where, mask in bits:
            held[where % len(held)] ^= mask
        return bytes(held)

    return spoil


class Place:
    """A copy of the world for one example."""

    def __init__(self, world: Path, here: Path) -> None:
        self.here = Path(shutil.copytree(world, here / "here"))
        run = self.here / "run" / "run.json"
        text = run.read_text(encoding="utf-8").replace(str(world), str(self.here))
        run.write_text(text, encoding="utf-8")

    def edit(self, name: str, edit: Callable[[Any], Any]) -> None:
        """Change a JSON file."""
        path = self.here / name
        document = edit(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(document), encoding="utf-8")

    def spoil(self, name: str, spoil: Callable[[bytes], bytes]) -> None:
        """Change a file's bytes."""
        path = self.here / name
        path.write_bytes(spoil(path.read_bytes()))

    def header(self, name: str, edit: Callable[[Any], Any], length: Callable[[int], int]) -> None:
        """Change the header of a safetensors file, and the length that it says the header has."""
        path = self.here / name
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        said = json.dumps(edit(json.loads(data[8:end]))).encode()
        path.write_bytes(struct.pack("<Q", length(len(said)) % 2**64) + said + data[end:])

    def record(self, name: str) -> None:
        """Let the run take a changed file for its own."""
        run = self.here / "run" / "run.json"
        document = json.loads(run.read_text(encoding="utf-8"))
        document["stages"][name]["sha256"] = file_sha256(self.here / "run" / name)
        run.write_text(json.dumps(document), encoding="utf-8")

    def survives(self, command: str, codes: tuple[int, ...] = (0, 2)) -> None:
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

    def make(run: Callable[[Place], None]) -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            made = Place(world, Path(folder))
            patch.chdir(made.here)
            patch.setenv("HOME", str(made.here / "home"))
            patch.setenv("ISINGCUT_CACHE", str(made.here / "home" / "cache"))
            patch.setenv("COLUMNS", "200")
            leave_speed_out(patch.setattr)
            run(made)

    return make


def fuzzed(examples: int) -> Any:
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


@fuzzed(30)
@given(edits(), st.sampled_from(MODEL_FILES), st.sampled_from([LOOK, LOOK, ENERGY]))
def test_model_files(place, edit, name, command):
    def run(at):
        at.edit(f"model/{name}", edit)
        at.survives(command)

    place(run)


LENGTHS = st.sampled_from(
    [lambda n: n, lambda n: n, lambda n: n + 1, lambda n: -1, lambda n: n * 9]
)


@fuzzed(30)
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


def within(edit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change the document that the header of a stage file holds as a text."""

    def change(header: Any) -> Any:
        document = edit(json.loads(header["__metadata__"]["isingcut"]))
        header["__metadata__"]["isingcut"] = json.dumps(document)
        return header

    return change


@fuzzed(50)
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


# The formats of GGUF's numbers, by their codes; 8 is a text and 9 a list.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}


def packed(kind: int, value: Any) -> bytes:
    """A value of a GGUF file."""
    if kind == 8:
        return text(value)
    if kind == 9:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(packed(inner, x) for x in items)
    return struct.pack(f"<{SCALARS[kind]}", value)


class Gguf:
    """A tiny llama as GGUF: keys (name, kind, value) and tensors (name, shape, kind, offset).

    Args:
        weights: the model's tensors, by their names in its checkpoint.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        llama = {"block_count": 6, "context_length": 128, "embedding_length": 32}
        llama |= {"feed_forward_length": 48, "rope.dimension_count": 8, "vocab_size": 262}
        llama |= {"attention.head_count": 4, "attention.head_count_kv": 2}
        tokens = ["<pad>", "<s>", "</s>", "a", "b", "ab", *(f"<{i}>" for i in range(256))]
        self.keys: list[list[Any]] = [["general.architecture", 8, "llama"]]
        self.keys += [[f"llama.{name}", 4, value] for name, value in llama.items()]
        self.keys += [
            ["llama.attention.layer_norm_rms_epsilon", 6, 1e-5],
            ["tokenizer.ggml.model", 8, "gpt2"],
            ["tokenizer.ggml.tokens", 9, (8, tokens)],
            ["tokenizer.ggml.token_type", 9, (5, [1] * len(tokens))],
            ["tokenizer.ggml.merges", 9, (8, ["a b"])],
            ["llama.leading_dense_block_count", 4, 0],
            ["general.alignment", 4, 32],
            ["tokenizer.ggml.bos_token_id", 4, 1],
            ["tokenizer.ggml.eos_token_id", 4, 2],
        ]
        self.tensors: list[list[Any]] = []
        self.data = b""
        for name, value in named(weights).items():
            self.tensors.append([name, value.shape[::-1], 0, len(self.data)])
            self.data += value.tobytes()

    def written(self, version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
        """The file; ``counts`` of tensors and keys may say otherwise."""
        counts = counts or (len(self.tensors), len(self.keys))
        head = b"GGUF" + struct.pack("<IQQ", version, *counts)
        head += b"".join(pair(key, kind, packed(kind, value)) for key, kind, value in self.keys)
        head += b"".join(info(*tensor) for tensor in self.tensors)
        return head + b"\0" * (-len(head) % 32) + self.data


VALUES = st.one_of(
    st.integers(0, 255).map(lambda n: [0, n]),
    st.sampled_from([0, 1, 3, 2**31]).map(lambda n: [4, n]),
    st.sampled_from([0, 5, 2**63]).map(lambda n: [10, n]),
    st.sampled_from([-1, -(2**63)]).map(lambda n: [11, n]),
    st.sampled_from([0.0, float("nan"), 1e30]).map(lambda x: [6, x]),
    st.booleans().map(lambda b: [7, b]),
    st.sampled_from(["", "llama", "phi3", "qwen2", "x" * 300]).map(lambda t: [8, t]),
    st.lists(st.integers(0, 9), max_size=6).map(lambda a: [9, (4, a)]),
    st.lists(st.text("ab", max_size=2), max_size=6).map(lambda a: [9, (8, a)]),
)
# What a tensor's name, shape, kind and offset become.
PARTS = {
    0: st.sampled_from(["", "blk.9.x", "output.weight", "blk.-1.a", "x" * 99]),
    1: st.lists(st.sampled_from([0, 1, 32, 48, 2**40]), max_size=5),
    2: st.integers(0, 45),
    3: st.sampled_from([0, 1, 32, 2**18, 2**63]),
}


@st.composite
def gguf_edits(draw: Any) -> Callable[[Gguf], bytes]:
    """Values of other kinds; other names, shapes, kinds or places of tensors; counts; bytes."""
    picks = []
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from([*PARTS, "value", "value", "value", "drop"]))
        new = draw(VALUES if part == "value" else PARTS.get(part, st.none()))
        picks.append((draw(st.integers(0, 10**4)), part, new))
    version = draw(st.sampled_from([3] * 7 + [2, 1, 9]))
    counts = draw(st.sampled_from([None] * 9 + [(0, 0), (1, 2**63), (2**32, 3)]))
    spoil = draw(st.none() | st.none() | st.none() | damage(4000))

    def edit(file: Gguf) -> bytes:
        for where, part, new in picks:
            key = file.keys[where % len(file.keys)]
            if part == "value":
                key[1:] = new
            elif part == "drop":
                file.keys.remove(key)
            else:
                file.tensors[where % len(file.tensors)][part] = new
        whole = file.written(version, counts)
        return spoil(whole) if spoil else whole

    return edit


@fuzzed(30)
@given(
    gguf_edits(),
    st.sampled_from(["inspect {here}/x.gguf", "excise {here}/run --gguf {here}/x.gguf"]),
)
def test_gguf(place, edit, command):
    def run(at):
        (at.here / "x.gguf").write_bytes(edit(Gguf(load_file(at.here / "model/model.safetensors"))))
        at.survives(command)

    place(run)


@pytest.mark.parametrize(
    "command",
    [
        LOOK,
        ENERGY,
        "inspect {here}/x.gguf",
        "excise {here}/run --gguf {here}/x.gguf --overwrite",
        *sorted({command for _, command in PAIRS}),
    ],
)
def test_unharmed_files_are_accepted(place, command):
    def run(at):
        (at.here / "x.gguf").write_bytes(
            Gguf(load_file(at.here / "model/model.safetensors")).written()
        )
        for name in STAGES.keys() - {"run.json"}:
            at.record(name)
        at.survives(command, (0,))

    place(run)
