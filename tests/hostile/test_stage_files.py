"""Every file of a run folder, damaged in many ways: one line, exit 2, never a wrong figure."""

import json
import os
import re
from pathlib import Path

from arena import Row, tried
from safetensors.numpy import save_file
from stage_files import EXTRAS, REPORT, SOLVE, edited, record, replaced, rewritten

from shared import cells, load_json, parametrize, refuses, save_json

WHOLE = {
    "truncated": (lambda c: c[: len(c) // 2], "not readable as JSON"),
    "binary": (lambda c: bytes(range(256)) * 9, "not readable as JSON"),
    "a list": (lambda c: b"[1, 2]", "not an isingcut .* file .*found None"),
    "deep": (lambda c: b"[" * 100000 + b"]" * 100000, "recursion limit"),
    "deep inside": (
        lambda c: c.rstrip()[:-1] + b', "x": ' + b"[" * 999 + b"]" * 999 + b"}",
        "recursion limit",
    ),
    "another format": (
        lambda c: json.dumps({**json.loads(c), "format": "isingcut-thing"}).encode(),
        "not an isingcut .* file .*'isingcut-thing'",
    ),
    "no number": (lambda c: c.rstrip()[:-1] + b', "x": NaN}', "expected value"),
    "too large a number": (
        lambda c: c.rstrip()[:-1] + b', "x": 1e999}',
        "not readable as JSON .Out of range float",
    ),
    "digits": (
        lambda c: c.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "not readable",
    ),
}
VERSIONS = {
    "newer": (3, "written by a newer isingcut"),
    "a truth": (True, "version: expected 1 or more, got True"),
    "zero": (0, "version: expected 1 or more, got 0"),
}
FILES = [
    "run.json",
    "spectrum.json",
    "candidates.json",
    "evaluation.json",
    "model/isingcut.json",
    *EXTRAS,
]
# All files have one reader: two of them get every damage, the others a few.
FULL = ("run.json", "candidates.json")
FEW = ("truncated", "a list", "another format")
ROWS = [
    Row(f"{file}: {name}", REPORT, line, rewritten(file, change))
    for file in FILES
    for name, (change, line) in WHOLE.items()
    if file in FULL or name in FEW
]
ROWS += [
    Row(
        "run.json: older",
        line,
        "by an older isingcut .file version 1, this",
        edited("run.json", "version", value=1),
    )
    for line in (REPORT, "solve {run} --remove 2 --overwrite", "rank {run} --overwrite")
]
ROWS += [
    Row(f"{file}: version {name}", REPORT, line, edited(file, "version", value=value))
    for file in FILES
    for name, (value, line) in VERSIONS.items()
    if file in FULL or name == "newer"
]
ROWS += [
    Row(f"{file} is {name}", REPORT, line, replaced(file, make))
    for file in ("candidates.json", "evaluation.json")
    for name, make, line in (
        ("a folder", os.mkdir, "is a folder; expected a regular file"),
        ("a pipe", os.mkfifo, "is a pipe; expected a regular file"),
    )
]

# A legality row, which later keys change.
ROW = '"name": "x", "coefficients": [1, 1, 1, 1, 1, 1], "sense": "<=", "rhs": 1, "reason": ""'
# Name :: path in the file :: new value (empty: the key is removed) :: expected line.
FIELDS = {
    "run.json": r"""
no blocks :: blocks ::  :: blocks: missing
no block :: blocks blocks :: [] :: blocks.blocks: List should have at least 1
blocks out of order :: blocks blocks 1 index :: 5 :: not numbered 0, 1
negative costs :: blocks blocks 1 bytes :: -1 :: blocks.1.bytes: expected
no seconds :: stages spectrum.json seconds :: null :: a finished stage lacks its seconds
batches of nothing :: provenance computed cpu batch_tokens :: 0 :: expected greater than or equal
a list of lists :: config keep :: [[1]] :: config.keep
no provenance :: provenance ::  :: provenance: missing
a short legality row :: blocks legality :: [{ROW, "coefficients": [1]}] :: for each of 6 blocks
a strange sense :: blocks legality :: [{ROW, "sense": "<"}] :: legality.0.sense: expected '=='
""",
    "spectrum.json": r"""
no states :: states :: [] :: states: List should have at least 1
an index below :: states 0 removed :: [-1] :: removed.0: expected greater
an index twice :: states 0 removed :: [4, 4] :: a block appears twice
""",
    "candidates.json": r"""
no choice :: chosen ::  :: chosen: missing
a loss null :: candidates 0 kl :: null :: candidates.0.kl: expected a valid number
a negative error :: candidates 0 kl_se :: -1.0 :: candidates.0.kl_se: expected
tokens none :: tokens :: 0 :: tokens: expected greater
""",
    "evaluation.json": r"""
one side :: after ::  :: after: missing
a negative perplexity :: before perplexity :: -2.0 :: perplexity: expected greater
""",
    "model/isingcut.json": r"""
blocks beyond :: removed :: [6] :: outside 0 to 5
""",
    "healed/healing.json": r"""
steps a dict :: steps :: {"loss": 1} :: steps: expected a valid list
""",
    "benchmarks.json": r"""
noise a text :: rows 0 more_than_noise :: "no" :: expected a valid boolean
""",
}


def damages(table):
    """Yield the parsed rows of such a table."""
    for name, path, value, line in cells(table):
        keys = [int(key) if key.isdigit() else key for key in path.split()]
        yield (
            name,
            keys,
            json.loads(value.replace("ROW", ROW) or "null"),
            value == "",
            line,
        )


ROWS += [
    Row(
        f"{file}: {name}",
        REPORT,
        rf"{Path(file).name} is damaged: .*{line}",
        edited(file, *path, value=value, drop=gone),
    )
    for file, table in FIELDS.items()
    for name, path, value, gone, line in damages(table)
]
# Other commands that read the same files as the report.
NO_BLOCKS = edited("run.json", "blocks", drop=True)
NO_RUN = "not an isingcut run folder"


ROWS += [
    Row("solve: run.json", SOLVE, "blocks: missing", NO_BLOCKS),
    Row(
        "solve without run.json", SOLVE, NO_RUN, lambda a: (a.run / "run.json").unlink()
    ),
    Row("a run folder that is a file", "report {run}/run.json", NO_RUN),
    Row(
        "a run folder that is a loop of links",
        "report {here}/loop",
        "not an isingcut run folder|cannot resolve",
        lambda a: os.symlink("loop", a.here / "loop"),
    ),
    Row(
        "run.json a dangling link",
        REPORT,
        NO_RUN,
        replaced("run.json", lambda f: os.symlink("nowhere", f)),
    ),
    Row("a name too long", "report {here}/" + 300 * "a", "File name too long"),
]


def test_no_control_character_of_a_run_reaches_its_report(arena):
    evil = "\x1b[31mred\x07\x9b\u202e [bold]"
    place = arena.run / "evaluation.json"
    found = load_json(place)
    for side in ("before", "after"):
        found["answers"]["pairs"][0][side]["text"] = evil
    save_json(place, found)
    record(arena, "evaluation.json")
    arena.works("report {run}", "run/report.*")
    for name in ("report.md", "report.html"):
        text = (arena.run / name).read_text()
        assert r"\x1b[31mred\x07\x9b\u202e [bold]" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def tensors(name, change, header=None):
    """Return a step that changes the arrays of a safetensors file, or values in its header."""

    def prepare(arena):
        from safetensors import safe_open

        file = arena.run / name
        with safe_open(file, framework="numpy") as found:
            meta = json.loads(found.metadata()["isingcut"])
            arrays = {k: found.get_tensor(k) for k in found.keys()}  # noqa: SIM118
        change(arrays)
        meta |= header or {}
        save_file(arrays, file, {"isingcut": json.dumps(meta)})
        record(arena, name)

    return prepare


def poked(key, value):
    def change(arrays):
        arrays[key] = arrays[key].copy()
        arrays[key].flat[1] = value

    return change


def without(key):
    return lambda arrays: arrays.pop(key)


HAMILTONIAN = "hamiltonian.safetensors"
BOMB = (1 << 62).to_bytes(8, "little")
ARRAYS = [
    ("J missing", without("J"), "missing 1 required .* 'J'"),
    ("h missing", without("h"), "missing 1 required .* 'h'"),
    (
        "a tensor too many",
        lambda a: a.update(K=a["J"]),
        "unexpected keyword argument 'K'",
    ),
    ("J not symmetric", poked("J", 99.0), "J must be symmetric"),
]
HEADERS = r"""
newer :: {"version": 2} :: newer isingcut
unit a list :: {"unit": []} :: unit: expected a valid string
meta a text :: {"meta": "x"} :: meta: expected a valid dictionary
passes a text :: {"meta": {"passes": "1"}} :: meta.passes: expected a valid number
search a list :: {"meta": {"search": []}} :: meta.search: expected a valid dictionary
another kind :: {"format": "isingcut-calibration"} :: not an isingcut hamiltonian file
"""
UNREADABLE = "not a readable safetensors file"
TENSORS = [
    *((name, tensors(HAMILTONIAN, change), line) for name, change, line in ARRAYS),
    *(
        (name, tensors(HAMILTONIAN, dict, json.loads(new)), line)
        for name, new, line in cells(HEADERS)
    ),
    ("truncated", rewritten(HAMILTONIAN, lambda c: c[:-9]), UNREADABLE),
    ("empty", rewritten(HAMILTONIAN, lambda c: b""), UNREADABLE),
    ("a header bomb", rewritten(HAMILTONIAN, lambda c: BOMB + c[8:]), UNREADABLE),
    (
        "a pipe",
        replaced(HAMILTONIAN, os.mkfifo),
        "a pipe; expected a regular file|not a regular",
    ),
]
ROWS += [
    Row(f"{HAMILTONIAN}: {name}", SOLVE, line, make) for name, make, line in TENSORS
]

test_a_damaged_file_is_one_line = tried(ROWS)


TEXT = "calibration.safetensors"
SPLITS = {
    "tokens missing": (without("rank.input_ids"), "KeyError: 'rank.input_ids'"),
    "other tokens": (poked("rank.input_ids", 5), "do not match its hash"),
}


@parametrize("change, line", SPLITS.values(), ids=SPLITS)
def test_damaged_tokens_are_one_line(arena, change, line):
    from isingcut.data.calibration import Calibration
    from isingcut.errors import StageFileError

    tensors(TEXT, change)(arena)
    with refuses(f"{TEXT} is damaged: .*{line}", StageFileError) as caught:
        Calibration.load(arena.run / TEXT)
    assert "\n" not in str(caught.value)
