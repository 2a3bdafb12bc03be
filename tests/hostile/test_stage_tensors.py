"""The tensor files of a run folder, damaged in every way: one line, and never a wrong figure."""

import json
import os
import shutil

import numpy as np
import pytest
from arena import Row
from safetensors.numpy import save_file
from stage_files import REPORT, SOLVE, record, replaced

from isingcut.files.writing import tensor_header


def tensors(name, change, header=None):
    """Prepares an arena in which a safetensors file has other arrays, or values in its header."""

    def prepare(arena):
        from safetensors import safe_open

        file = arena.run / name
        with safe_open(file, framework="numpy") as found:
            meta = json.loads(found.metadata()["isingcut"])
            arrays = {k: found.get_tensor(k) for k in found.keys()}  # noqa: SIM118
        change(arrays)
        meta |= header or {}
        save_file(arrays, file, tensor_header(meta))
        record(arena, name)

    return prepare


def poked(key, value):
    def change(arrays):
        arrays[key] = arrays[key].copy()
        arrays[key].flat[1] = value

    return change


def without(key):
    return lambda arrays: arrays.pop(key)


def zeros(dtype="float64", **shapes):
    """Other arrays, of zeros; ``rank_mask`` is ``rank.mask``."""
    names = {key.replace("_", ".", 1): shape for key, shape in shapes.items()}
    return lambda arrays: arrays.update({k: np.zeros(n, dtype) for k, n in names.items()})


def nothing(arrays):
    pass


def raw(name, change):
    def prepare(arena):
        file = arena.run / name
        file.write_bytes(change(file.read_bytes()))
        record(arena, name)

    return prepare


HAMILTONIAN, BOMB = "hamiltonian.safetensors", (1 << 62).to_bytes(8, "little")
SHAPE = r"expected F64 of shape \(6,"
ARRAYS = [
    ("J missing", without("J"), "the tensor J is missing"),
    ("h missing", without("h"), "h is missing|h: expected"),
    ("h a matrix", zeros(h=(6, 6)), rf"h: {SHAPE}\), got F64 of shape \(6, 6\)"),
    ("h a scalar", zeros(h=()), r"h: expected F64 of shape"),
    ("h of nothing", zeros(h=0, J=(0, 0)), "h must be a vector with at least one entry"),
    ("of other blocks", zeros(h=4, J=(4, 4)), "for 4 blocks, but the run's model has 6"),
    ("J of another size", zeros(J=(4, 4)), rf"J: {SHAPE} 6\), got"),
    ("J whole numbers", zeros("int64", J=(6, 6)), "J: expected F64 .* got I64"),
    ("J half as precise", zeros("float32", J=(6, 6)), "J: expected F64 .* got F32"),
    ("J without number", poked("J", np.nan), "J has values that are not"),
    ("h infinite", poked("h", np.inf), "h has values that are not finite"),
    ("J not symmetric", poked("J", 99.0), "J must be symmetric"),
    ("c missing", without("c"), "the tensor c is missing"),
]
HEADERS = [
    ("newer", {"version": 2}, "newer isingcut"),
    ("version a text", {"version": "1"}, "version: expected 1 or more"),
    ("unit a list", {"unit": []}, "unit: expected a valid string"),
    ("meta a text", {"meta": "x"}, "meta: expected a valid dictionary"),
    ("passes a text", {"meta": {"passes": "1"}}, "meta.passes: expected a valid number"),
    ("search a list", {"meta": {"search": []}}, "meta.search: expected a valid dictionary"),
    ("another kind", {"format": "isingcut-calibration"}, "not an isingcut hamiltonian file"),
]
UNREADABLE = "not a readable safetensors file"
TENSORS = [
    *((name, tensors(HAMILTONIAN, change), line) for name, change, line in ARRAYS),
    *((name, tensors(HAMILTONIAN, nothing, new), line) for name, new, line in HEADERS),
    ("truncated", raw(HAMILTONIAN, lambda c: c[:-9]), UNREADABLE),
    ("empty", raw(HAMILTONIAN, lambda c: b""), UNREADABLE),
    ("a header bomb", raw(HAMILTONIAN, lambda c: BOMB + c[8:]), UNREADABLE),
    ("a pipe", replaced(HAMILTONIAN, os.mkfifo), "a pipe; expected a regular file|not a regular"),
]
ROWS = [Row(f"{HAMILTONIAN}: {name}", SOLVE, line, make) for name, make, line in TENSORS]
ROWS.append(
    Row(
        "another energy of other blocks",
        REPORT,
        "for 4 blocks, but the run's model has 6",
        lambda a: (
            shutil.copy(a.run / HAMILTONIAN, a.run / "hamiltonian.fisher.safetensors"),
            tensors("hamiltonian.fisher.safetensors", zeros(h=4, J=(4, 4)))(a),
        ),
    )
)


@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_a_damaged_tensor_file_is_one_line(arena, row):
    arena.try_row(row)


TEXT = "calibration.safetensors"
SPLITS = {
    "tokens missing": (without("rank.input_ids"), "tensor rank.input_ids is missing"),
    "a mask of numbers": (zeros("int64", rank_mask=(3, 16)), "mask: expected BOOL .* got I64"),
    "a mask of another size": (zeros(bool, rank_mask=(3, 9)), r"BOOL of shape \(3, 16\)"),
    "tokens in a row": (zeros("int64", rank_input_ids=16), "input_ids: expected I64 of shape"),
    "no sample": (
        lambda a: (zeros("int64", rank_input_ids=(0, 16))(a), zeros(bool, rank_mask=(0, 16))(a)),
        "do not match its hash",
    ),
    "tokens fractions": (zeros(rank_input_ids=(3, 16)), "input_ids: expected I64 .* got F64"),
    "tokens negative": (poked("rank.input_ids", -5), "do not match its hash"),
    "holes in a mask": (poked("rank.mask", False), "do not match its hash"),
    "other tokens": (poked("rank.input_ids", 5), "do not match its hash"),
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
