"""The tensor files of a run folder, damaged in every way: one line, and never a wrong figure."""

import json
import os
import shutil

import numpy as np
import pytest
from arena import Row
from safetensors.numpy import save_file
from stage_files import REPORT, SOLVE, record, replaced

from isingcut.files.tensors import tensor_header


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
ROWS = [Row(f"{HAMILTONIAN}: {n}", SOLVE, line, make) for n, (make, line) in TENSORS.items()]
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
def test_a_damaged_tensor_file_is_one_line(arena, row):
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
        "do not match its own hash",
    ),
    "tokens fractions": (
        lambda a: a.update({"rank.input_ids": np.zeros((3, 16))}),
        "rank.input_ids: expected I64 .* got F64",
    ),
    "tokens negative": (poked("rank.input_ids", -5), "do not match its own hash"),
    "holes in a mask": (poked("rank.mask", False), "do not match its own hash"),
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
