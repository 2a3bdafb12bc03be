"""Every file of a run folder, damaged in every way: one line, exit 2, and never a wrong figure.

An edited file is refused by its hash; these rows record the new hash in `run.json`, as whoever
made the folder could have, so that what is tried is the reading itself.
"""

import base64
import copy
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from arena import Row
from safetensors.numpy import save_file

from isingcut.files import write_json
from isingcut.tensor_files import tensor_header

sys.path.insert(0, str(Path(__file__).parents[1]))
from run_files import baseline, healing

SOLVE = "solve {run} --remove 2 --overwrite"
REPORT = "report {run}"


def record(arena, name):
    """Note in run.json that the file is as the run wrote it."""
    if name == "run.json":
        return
    place = arena.run / "run.json"
    run = json.loads(place.read_text(encoding="utf-8"))
    file = arena.run / name
    # What lies in a folder, or beside it, goes with the folder's record.
    key = {"healing.json": "healed"}.get(name, name.partition("/")[0])
    plain = file.is_file() and key == name
    made = {"stage": "any", "fingerprint": "0", "options": {}, "done": True, "seconds": 0.0}
    run["stages"][key] = {
        **run["stages"].get(key, made),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if plain else None,
    }
    place.write_text(json.dumps(run), encoding="utf-8")


EXTRAS = {
    "baseline-sleb.json": ("baseline", lambda: baseline("sleb", [0, 1], 0.5)),
    "healing.json": (
        "healing",
        lambda: healing([{"step": 1, "tokens": 64, "loss": 2.0}], [4, 5], 6),
    ),
    "healed-candidates.json": (
        "healed-candidates",
        lambda: {"candidates": [HEALED], "chosen": copy.deepcopy(HEALED)},
    ),
    "benchmarks.json": ("benchmarks", lambda: {"rows": [dict(TASK)], "engine": "lm_eval 0.4"}),
}
HEALED = {"removed": [4, 5], "kl": 0.5, "kl_se": 0.1, "kl_before": 0.7, "perplexity": 20.0}
TASK = {
    "task": "piqa", "metric": "acc", "n": 9, "shots": 0, "original": 0.5, "original_se": 0.1,
    "cut": 0.4, "cut_se": 0.1, "difference": -0.1, "difference_low": -0.2,
    "difference_high": 0.0, "p_value": 0.5, "test": "mcnemar", "more_than_noise": False,
}  # fmt: skip


def provide(arena, name):
    """The file, also where the small run did not come to write it."""
    if name in EXTRAS:
        kind, content = EXTRAS[name]
        write_json(arena.run / name, kind, content())
        record(arena, name)
    return arena.run / name


def rewritten(name, change):
    """Prepares an arena in which ``change(bytes)`` is the content of a file."""

    def prepare(arena):
        file = provide(arena, name)
        file.write_bytes(change(file.read_bytes()))
        record(arena, name)

    return prepare


def edited(name, *path, value=None, drop=False):
    """Prepares an arena in which one value of a JSON file is another."""

    def change(content):
        document = json.loads(content)
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return json.dumps(document).encode()

    return rewritten(name, change)


def replaced(name, make):
    """Prepares an arena in which something that is no file stands in its place."""

    def prepare(arena):
        file = provide(arena, name)
        file.unlink()
        make(file)
        record(arena, name)

    return prepare


def first_key_twice(content):
    return content.replace(b"{", b'{"version": 1, ', 1)


WHOLE = {
    "empty": (lambda c: b"", "not readable as JSON|not an isingcut"),
    "truncated": (lambda c: c[: len(c) // 2], "not readable as JSON"),
    "binary": (lambda c: bytes(range(256)) * 9, "not readable as JSON"),
    "a list": (lambda c: b"[1, 2]", "not an isingcut .* file .*found None"),
    "a number": (lambda c: b"7", "not an isingcut .* file .*found None"),
    "deep": (lambda c: b"[" * 100000 + b"]" * 100000, "nested deeper"),
    "deep inside": (
        lambda c: c.rstrip()[:-1] + b', "x": ' + b"[" * 999 + b"]" * 999 + b"}",
        "nested deeper",
    ),
    "a name twice": (first_key_twice, "'version' appears twice"),
    "another format": (
        lambda c: json.dumps({**json.loads(c), "format": "isingcut-thing"}).encode(),
        "not an isingcut .* file .*'isingcut-thing'",
    ),
    "no number": (lambda c: c.rstrip()[:-1] + b', "x": NaN}', "NaN is not JSON"),
    "too large a number": (lambda c: c.rstrip()[:-1] + b', "x": 1e999}', "larger than any"),
    "digits": (lambda c: c.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}", "not readable"),
}
VERSIONS = {
    "newer": (2, "written by a newer isingcut"),
    "a truth": (True, "version: expected a number from 1, got True"),
    "a text": ("1", "version: expected a number from 1, got '1'"),
    "a fraction": (1.5, "version: expected a number from 1, got 1.5"),
    "zero": (0, "version: expected a number from 1, got 0"),
    "negative": (-3, "version: expected a number from 1, got -3"),
    "null": (None, "version: expected a number from 1, got None"),
    "a list": ([1], r"version: expected a number from 1, got \[1\]"),
}
FILES = [
    "run.json",
    "spectrum.json",
    "candidates.json",
    "evaluation.json",
    "model/isingcut.json",
    *EXTRAS,
]
# What one reader does for all files is tried in full on two of them, and a little on each.
FULL = ("run.json", "candidates.json")
FEW = ("truncated", "a list", "another format")
ROWS = [
    Row(f"{file}: {name}", REPORT, line, rewritten(file, change))
    for file in FILES
    for name, (change, line) in WHOLE.items()
    if file in FULL or name in FEW
]
ROWS += [
    Row(f"{file}: version {name}", REPORT, line, edited(file, "version", value=value))
    for file in FILES
    for name, (value, line) in VERSIONS.items()
    if file in FULL or name in ("newer", "a text")
]
ROWS += [
    Row(f"{file} is {name}", REPORT, line, replaced(file, make))
    for file in ("candidates.json", "evaluation.json")
    for name, make, line in (
        ("a folder", os.mkdir, "is a folder; expected a plain file"),
        ("a pipe", os.mkfifo, "is a pipe; expected a plain file"),
    )
]

MISSING = object()
FIELDS = {
    "run.json": [
        ("no blocks", ("blocks",), MISSING, "blocks: it is missing"),
        ("blocks a list", ("blocks",), [], "blocks: expected a valid dictionary"),
        ("no block", ("blocks", "blocks"), [], "blocks.blocks: List should have at least 1"),
        ("blocks out of order", ("blocks", "blocks", 1, "index"), 5, "not numbered from 0"),
        ("a kind that is no text", ("blocks", "blocks", 1, "kind"), 3, "blocks.1.kind: expected"),
        ("negative costs", ("blocks", "blocks", 1, "bytes"), -1, "blocks.1.bytes: expected"),
        (
            "a short legality row",
            ("blocks", "legality"),
            [{"name": "x", "coefficients": [1.0], "sense": "<=", "rhs": 1, "reason": ""}],
            "a coefficient for each of 6 blocks",
        ),
        (
            "a strange sense",
            ("blocks", "legality"),
            [{"name": "x", "coefficients": [1.0] * 6, "sense": "<", "rhs": 1, "reason": ""}],
            "legality.0.sense: expected '=='",
        ),
        ("stages a list", ("stages",), [], "stages: expected a valid dictionary"),
        ("a stage a text", ("stages", "spectrum.json"), "x", "stages.spectrum.json: expected"),
        (
            "a stage done twice",
            ("stages", "spectrum.json", "done"),
            2,
            "stages.spectrum.json.done: expected a valid boolean",
        ),
        (
            "a stage without its seconds",
            ("stages", "spectrum.json", "seconds"),
            None,
            "a finished stage needs its seconds",
        ),
        ("no config", ("config",), None, "config: expected a valid dictionary"),
        ("an energy a number", ("config", "energy"), 4, "config.energy: expected a valid string"),
        ("a seed a text", ("config", "seed"), "0", "config.seed: expected a valid integer"),
        ("a list of lists", ("config", "keep"), [[1]], "config.keep"),
        ("no provenance", ("provenance",), MISSING, "provenance: it is missing"),
        ("a model without name", ("provenance", "model", "name"), None, "provenance.model.name"),
        (
            "tokens a text",
            ("provenance", "calibration", "splits", "rank", "tokens"),
            "many",
            "splits.rank.tokens: expected a valid integer",
        ),
        (
            "batches of nothing",
            ("provenance", "computed", "cpu", "batch_tokens"),
            0,
            "computed.cpu.batch_tokens: expected greater than or equal to 1",
        ),
    ],
    "spectrum.json": [
        ("n of others", ("n",), 7, "over 7 blocks, the run's model has 6"),
        ("n huge", ("n",), 10**12, "n: expected less than"),
        ("n a truth", ("n",), True, "n: expected a valid integer, got True"),
        ("n zero", ("n",), 0, "n: expected greater"),
        ("no states", ("states",), [], "states: List should have at least 1"),
        ("states a dict", ("states",), {}, "states: expected a valid list"),
        ("an index beyond", ("states", 0, "removed"), [6], "not among the 6"),
        ("an index below", ("states", 0, "removed"), [-1], "removed.0: expected greater"),
        ("an index twice", ("states", 0, "removed"), [4, 4], "a block is named twice"),
        ("an index a fraction", ("states", 0, "removed"), [1.5], "removed.0: expected a valid"),
        ("an energy a text", ("states", 0, "energy"), "low", "energy: expected a valid number"),
        ("an energy beyond", ("states", 0, "energy"), 1e300, "energy: expected less than"),
        ("proven a text", ("proven",), "yes", "proven: expected a valid boolean"),
        ("no solver", ("solver",), None, "solver: expected a valid string"),
    ],
    "candidates.json": [
        ("no choice", ("chosen",), MISSING, "chosen: it is missing"),
        ("a choice null", ("chosen",), None, "chosen: expected a valid dictionary"),
        ("a choice beyond", ("chosen", "removed"), [99], "names block 99, the run's model has 6"),
        ("a choice of texts", ("chosen", "removed"), ["4"], "removed.0: expected a valid integer"),
        ("a loss null", ("candidates", 0, "kl"), None, "candidates.0.kl: expected a valid number"),
        ("a negative error", ("candidates", 0, "kl_se"), -1.0, "candidates.0.kl_se: expected"),
        ("candidates a dict", ("candidates",), {}, "candidates: expected a valid list"),
        ("no correlation", ("fidelity", "kl"), [], "fidelity.kl: expected a valid dictionary"),
        ("a correlation of texts", ("fidelity", "kl", "n"), "9", "fidelity.kl.n: expected"),
        ("others a list", ("fidelity_of_others",), [1], "fidelity_of_others: expected"),
        ("a position a text", ("chosen", "position"), "0", "chosen.position: expected"),
        ("tokens none", ("tokens",), 0, "tokens: expected greater"),
    ],
    "evaluation.json": [
        ("one side", ("after",), MISSING, "after: it is missing"),
        ("a side a list", ("before",), [], "before: expected a valid dictionary"),
        ("no parameters", ("before", "parameters"), None, "before.parameters: expected"),
        ("a speed a text", ("after", "decode_tokens_per_second"), "fast", "expected a valid num"),
        ("a negative perplexity", ("before", "perplexity"), -2.0, "perplexity: expected greater"),
        ("a prompt a number", ("generation", "prompt"), 3, "prompt: expected a valid string"),
    ],
    "model/isingcut.json": [
        ("blocks beyond", ("removed",), [6], "not among the 6"),
        ("of others", ("of",), 12, "over 12 blocks|changed"),
        ("removed a text", ("removed",), "4,5", "removed: expected a valid list"),
    ],
    "baseline-sleb.json": [
        ("blocks beyond", ("removed",), [0, 44], "names block 44"),
        ("an empty merge", ("merges",), [[]], "merges.0: List should have at least 1"),
        ("a merge beyond", ("merges",), [[0, 9]], "names block 9"),
        ("a name a list", ("baseline",), ["x"], "baseline: expected a valid string"),
        ("passes null", ("passes",), None, "passes: expected a valid number"),
        ("violated a text", ("violated",), "all", "violated: expected a valid list"),
    ],
    "healing.json": [
        ("steps a dict", ("steps",), {"loss": 1}, "steps: expected a valid list"),
        ("a loss a text", ("steps", 0, "loss"), "high", "steps.0.loss: expected a valid number"),
        ("options a list", ("options",), [], "options: expected a valid dictionary"),
        ("no scores after", ("after",), None, "after: expected a valid dictionary"),
        ("tokens a text", ("report_tokens",), "9", "report_tokens: expected a valid integer"),
    ],
    "healed-candidates.json": [
        ("none", ("candidates",), [], "candidates: List should have at least 1"),
        ("a choice beyond", ("chosen", "removed"), [6], "names block 6"),
        ("no loss before", ("candidates", 0, "kl_before"), None, "kl_before: expected"),
    ],
    "benchmarks.json": [
        ("rows a dict", ("rows",), {}, "rows: expected a valid list"),
        ("a score null", ("rows", 0, "cut"), None, "rows.0.cut: expected a valid number"),
        ("a task a number", ("rows", 0, "task"), 5, "rows.0.task: expected a valid string"),
        ("noise a text", ("rows", 0, "more_than_noise"), "no", "expected a valid boolean"),
    ],
}
ROWS += [
    Row(
        f"{file}: {name}",
        REPORT,
        rf"{Path(file).name} is damaged: .*{line}",
        edited(file, *path, value=value, drop=value is MISSING),
    )
    for file, damages in FIELDS.items()
    for name, path, value, line in damages
]
# Verbs that read by themselves what the report reads too.
ROWS += [
    Row("solve: run.json", SOLVE, "blocks: it is missing", edited("run.json", "blocks", drop=True)),
    Row(
        "export: candidates.json",
        "export {run} --mergekit -",
        "names block 99",
        edited("candidates.json", "chosen", "removed", value=[99]),
    ),
    Row(
        "push: isingcut.json",
        "push {run}/model me/it",
        "removed: expected a valid list",
        edited("model/isingcut.json", "removed", value=None),
    ),
    Row(
        "solve without run.json",
        SOLVE,
        "not an isingcut run folder",
        lambda a: (a.run / "run.json").unlink(),
    ),
    Row("a run folder that is a file", "report {run}/run.json", "not an isingcut run folder"),
    Row(
        "a run folder that is a loop of links",
        "report {here}/loop",
        "not an isingcut run folder|cannot be resolved",
        lambda a: os.symlink("loop", a.here / "loop"),
    ),
    Row(
        "run.json a dangling link",
        REPORT,
        "not an isingcut run folder",
        replaced("run.json", lambda f: os.symlink("nowhere", f)),
    ),
    Row("a name too long", "report {here}/" + 300 * "a", "File name too long"),
]


def tensors(name, change, header=None):
    """Prepares an arena in which a safetensors file has other arrays or another header."""

    def prepare(arena):
        from safetensors import safe_open

        file = arena.run / name
        with safe_open(file, framework="numpy") as found:
            meta = json.loads(found.metadata()["isingcut"])
            arrays = {k: found.get_tensor(k) for k in found.keys()}  # noqa: SIM118
        change(arrays)
        if header is not None:
            header(meta)
        save_file(arrays, file, tensor_header(meta))
        record(arena, name)

    return prepare


def poked(key, value):
    def change(arrays):
        arrays[key] = arrays[key].copy()
        arrays[key].flat[1] = value

    return change


def nothing(arrays):
    pass


def raw(name, change):
    def prepare(arena):
        file = arena.run / name
        file.write_bytes(change(file.read_bytes()))
        record(arena, name)

    return prepare


HAMILTONIAN = "hamiltonian.safetensors"
TENSORS = {
    "J missing": (tensors(HAMILTONIAN, lambda a: a.pop("J")), "the tensor J is missing"),
    "h missing": (tensors(HAMILTONIAN, lambda a: a.pop("h")), "h is missing|h: expected"),
    "h a matrix": (
        tensors(HAMILTONIAN, lambda a: a.update(h=np.zeros((6, 6)))),
        r"h: expected F64 of shape \(6,\), got F64 of shape \(6, 6\)",
    ),
    "h a scalar": (
        tensors(HAMILTONIAN, lambda a: a.update(h=np.zeros(()))),
        r"h: expected F64 of shape",
    ),
    "h of nothing": (
        tensors(HAMILTONIAN, lambda a: a.update(h=np.zeros(0), J=np.zeros((0, 0)))),
        "h must be a vector with at least one entry",
    ),
    "of other blocks": (
        tensors(HAMILTONIAN, lambda a: a.update(h=np.zeros(4), J=np.zeros((4, 4)))),
        "over 4 blocks, the run's model has 6",
    ),
    "J of another size": (
        tensors(HAMILTONIAN, lambda a: a.update(J=np.zeros((4, 4)))),
        r"J: expected F64 of shape \(6, 6\), got",
    ),
    "J whole numbers": (
        tensors(HAMILTONIAN, lambda a: a.update(J=np.zeros((6, 6), np.int64))),
        "J: expected F64 .* got I64",
    ),
    "J half as precise": (
        tensors(HAMILTONIAN, lambda a: a.update(J=np.zeros((6, 6), np.float32))),
        "J: expected F64 .* got F32",
    ),
    "J without number": (tensors(HAMILTONIAN, poked("J", np.nan)), "J holds values that are not"),
    "h infinite": (tensors(HAMILTONIAN, poked("h", np.inf)), "h holds values that are not finite"),
    "J not symmetric": (tensors(HAMILTONIAN, poked("J", 99.0)), "J must be symmetric"),
    "c missing": (tensors(HAMILTONIAN, lambda a: a.pop("c")), "the tensor c is missing"),
    "newer": (tensors(HAMILTONIAN, nothing, lambda m: m.update(version=2)), "newer isingcut"),
    "version a text": (
        tensors(HAMILTONIAN, nothing, lambda m: m.update(version="1")),
        "version: expected a number",
    ),
    "unit a list": (
        tensors(HAMILTONIAN, nothing, lambda m: m.update(unit=[])),
        "unit: expected a valid string",
    ),
    "meta a text": (
        tensors(HAMILTONIAN, nothing, lambda m: m.update(meta="x")),
        "meta: expected a valid dictionary",
    ),
    "passes a text": (
        tensors(HAMILTONIAN, nothing, lambda m: m["meta"].update(passes="1")),
        "meta.passes: expected a valid number",
    ),
    "search a list": (
        tensors(HAMILTONIAN, nothing, lambda m: m["meta"].update(search=[])),
        "meta.search: expected a valid dictionary",
    ),
    "header of another kind": (
        tensors(HAMILTONIAN, nothing, lambda m: m.update(format="isingcut-calibration")),
        "not an isingcut hamiltonian file",
    ),
    "truncated": (raw(HAMILTONIAN, lambda c: c[:-9]), "not a readable safetensors file"),
    "empty": (raw(HAMILTONIAN, lambda c: b""), "not a readable safetensors file"),
    "a header bomb": (
        raw(HAMILTONIAN, lambda c: (1 << 62).to_bytes(8, "little") + c[8:]),
        "not a readable safetensors file",
    ),
    "a pipe": (replaced(HAMILTONIAN, os.mkfifo), "a pipe; expected a plain file|no plain file"),
}
ROWS += [Row(f"{HAMILTONIAN}: {n}", SOLVE, line, make) for n, (make, line) in TENSORS.items()]
ROWS.append(
    Row(
        "another energy of other blocks",
        REPORT,
        "over 4 blocks, the run's model has 6",
        lambda a: (
            shutil.copy(a.run / HAMILTONIAN, a.run / "hamiltonian.fisher.safetensors"),
            tensors(
                "hamiltonian.fisher.safetensors",
                lambda t: t.update(h=np.zeros(4), J=np.zeros((4, 4))),
            )(a),
        ),
    )
)


@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_a_damaged_file_is_one_line(arena, row):
    arena.try_row(row)


TEXT = "calibration.safetensors"
SPLITS = {
    "tokens missing": (lambda a: a.pop("rank.input_ids"), "tensor rank.input_ids is missing"),
    "a mask of numbers": (
        lambda a: a.update({"rank.mask": np.ones((3, 16), np.int64)}),
        "rank.mask: expected BOOL .* got I64",
    ),
    "a mask of another size": (
        lambda a: a.update({"rank.mask": np.ones((3, 9), bool)}),
        r"rank.mask: expected BOOL of shape \(3, 16\)",
    ),
    "tokens in a row": (
        lambda a: a.update({"rank.input_ids": np.zeros(16, np.int64)}),
        "rank.input_ids: expected I64 of shape",
    ),
    "no sample": (
        lambda a: a.update(
            {"rank.input_ids": np.zeros((0, 16), np.int64), "rank.mask": np.zeros((0, 16), bool)}
        ),
        "rank has no sample",
    ),
    "tokens fractions": (
        lambda a: a.update({"rank.input_ids": np.zeros((3, 16))}),
        "rank.input_ids: expected I64 .* got F64",
    ),
    "tokens negative": (poked("rank.input_ids", -5), "rank.input_ids holds negative tokens"),
    "holes in a mask": (poked("rank.mask", False), "rank.mask is not a run of real tokens"),
    "other tokens": (poked("rank.input_ids", 5), "do not match its own hash"),
}


@pytest.mark.parametrize(("change", "line"), SPLITS.values(), ids=SPLITS)
def test_damaged_tokens_are_one_line(arena, change, line):
    from isingcut.data.calibration import Calibration
    from isingcut.errors import StageFileError

    tensors(TEXT, change)(arena)
    with pytest.raises(StageFileError, match=f"{TEXT} is damaged: .*{line}") as caught:
        Calibration.load(arena.run / TEXT)
    assert "\n" not in str(caught.value)


def test_damaged_tokens_end_a_command(arena):
    arena.try_row(
        Row(
            "rank",
            "rank {run} --random-states 31 --overwrite",
            "the tensor rank.mask is missing",
            tensors(TEXT, lambda a: a.pop("rank.mask")),
            makes=("run/run.json",),
        )
    )


def of_no_shape(key, shape, data):
    """A line as the journal writes it, with a right checksum."""
    crc = zlib.crc32(data, zlib.crc32(f"{key}:{shape}".encode()))
    line = {"key": key, "shape": shape, "crc": crc, "data": base64.b64encode(data).decode()}
    return json.dumps(line).encode() + b"\n"


NAN, ONES = np.full((2, 2, 3), np.nan).tobytes(), np.ones(12).tobytes()
LINES = {
    "truncated": lambda c: c[: len(c) - 7],
    "no rows": lambda c: c.splitlines(keepends=True)[0],
    "empty": lambda c: b"",
    "binary": lambda c: c + bytes(range(256)),
    "deep": lambda c: c + b"[" * 100000 + b"\n",
    "a list": lambda c: c + b"[1]\n",
    "a text": lambda c: c + b'"x"\n',
    "null": lambda c: c + b"null\n",
    "no data": lambda c: c + b'{"key": "0:0-1", "shape": [1], "crc": 0}\n',
    "a key of others": lambda c: c + of_no_shape("slopes", [12], ONES),
    "a batch beyond": lambda c: c + of_no_shape("77:0-1", [2, 2, 3], ONES),
    "states beyond": lambda c: c + of_no_shape("0:0-99", [2, 2, 3], ONES),
    "another shape": lambda c: c + of_no_shape("0:0-3", [12], ONES),
    "a shape that wraps": lambda c: c + of_no_shape("0:0-3", [-1, 3], ONES),
    "a huge shape": lambda c: c + of_no_shape("0:0-3", [10**30], ONES),
    "no number": lambda c: c + of_no_shape("0:0-1", [2, 2, 3], NAN),
    "another measurement": lambda c: c.replace(b'"fingerprint": "', b'"fingerprint": "0', 1),
}


@pytest.mark.parametrize("change", LINES.values(), ids=LINES)
def test_what_a_damaged_journal_lost_is_measured_again(interrupted, change):
    arena, before = interrupted
    journal = arena.run / "candidates.journal"
    journal.write_bytes(change(journal.read_bytes()))
    makes = ("run/run.json", "run/candidates.json", "run/candidates.journal")
    arena.try_row(Row("rank", "rank {run}", code=0, makes=makes))
    after = json.loads((arena.run / "candidates.json").read_text(encoding="utf-8"))
    assert after == before


left_behind = {}


@pytest.fixture
def interrupted(arena, monkeypatch):
    """A run whose ranking was interrupted with its journal full, and the ranking it had."""
    before = json.loads((arena.run / "candidates.json").read_text(encoding="utf-8"))
    (arena.run / "candidates.json").unlink()
    names = ("run.json", "candidates.journal")
    if not left_behind:

        def stop(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("isingcut.evaluation.candidates.to_dict", stop)
            makes = tuple(f"run/{name}" for name in names)
            arena.try_row(Row("rank", "rank {run}", code=130, makes=makes))
        left_behind.update({name: (arena.run / name).read_bytes() for name in names})
        assert len(left_behind["candidates.journal"].splitlines()) > 1
    for name, content in left_behind.items():
        (arena.run / name).write_bytes(content)
    return arena, before


PLACES = {
    "a user's own file": (lambda f: f.write_text("mine", encoding="utf-8"), "not a journal"),
    "a folder": (lambda f: f.mkdir(), "is a folder; expected a plain file"),
    "a pipe": (os.mkfifo, "is a pipe; expected a plain file"),
    "a dangling link": (lambda f: f.symlink_to("nowhere"), "is a link to nothing"),
}


@pytest.mark.parametrize(("make", "line"), PLACES.values(), ids=PLACES)
def test_what_is_no_journal_stays(interrupted, make, line):
    arena, _ = interrupted
    journal = arena.run / "candidates.journal"
    journal.unlink()
    make(journal)
    arena.try_row(Row("rank", "rank {run}", line, makes=("run/run.json",)))


def test_no_control_character_of_a_run_reaches_its_report(arena):
    evil = "\x1b[31mred\x07\x9b\u202e\ud800 [bold]"
    place = arena.run / "evaluation.json"
    found = json.loads(place.read_text(encoding="utf-8"))
    found["generation"] |= {"before": evil, "after": evil}
    place.write_text(json.dumps(found), encoding="utf-8")
    record(arena, "evaluation.json")
    arena.try_row(Row("report", "report {run}", code=0, makes=("run/report.*",)))
    for name in ("report.md", "report.html"):
        text = (arena.run / name).read_text(encoding="utf-8")
        assert r"\x1b[31mred\x07\x9b\u202e\ud800 [bold]" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
