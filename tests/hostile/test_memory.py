"""Out of memory: one line says how much was needed, and it is not called an internal error."""

import errno
import os
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import isingcut
from isingcut.formats.architectures.blocks import catch_text_errors
from isingcut.formats.libraries import catch_errors
from isingcut.healing.heal import heal
from isingcut.memory import is_memory_exhausted
from isingcut.models import verify
from shared import MemoryExhaustedError, parametrize, refuses

TOO_MANY = 10**15


def raises(error):
    return Mock(side_effect=error)


def in_torch(*arguments, **options):
    torch.empty(TOO_MANY)


GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
MPS = "MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 256 bytes on shared pool"
HANDLE = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
EXHAUSTED = {
    "Python": (lambda *a: bytearray(1 << 62), None, "this machine"),
    "NumPy": (lambda *a: np.empty(1 << 50), 2**53, "this machine"),
    "torch": (in_torch, 4 * TOO_MANY, "this machine"),
    "the system": (
        raises(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        None,
        "this machine",
    ),
    "CUDA": (raises(torch.OutOfMemoryError(GPU)), 20 * 2**30, "the GPU"),
    "MPS": (raises(RuntimeError(MPS)), 256, "the GPU"),
    "cuBLAS": (raises(RuntimeError(HANDLE)), None, "the GPU"),
}


@parametrize("use_up, wanted, where", EXHAUSTED.values(), ids=EXHAUSTED)
def test_a_command_ends_with_one_line(arena, monkeypatch, use_up, wanted, where):
    monkeypatch.setattr("isingcut.report.write.RunFiles", use_up)
    more = "" if wanted is None else f": {wanted:,} more bytes were needed"
    arena.refuses("report {run}", f"{where} is out of memory{more}.*; .*--stream")


@parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_are_no_used_up_memory(error):
    assert not is_memory_exhausted(error)


WHOLE = {"model": "model", "remove": 2, "calibration": "text.txt"}
HEAL = {"student": "run/model", "teacher": "model", "text": "text.txt", "out": "new"}
DOORS = {
    "run": lambda: isingcut.run(out="new", **WHOLE),
    "energy": lambda: isingcut.energy(out="new", **WHOLE),
    "prune": lambda: isingcut.prune(out="new", **WHOLE),
    "ranking": lambda: isingcut.open_run("run", 3).ranking,
    "save": lambda: isingcut.open_run("run").save("new"),
    "evaluate": lambda: isingcut.open_run("run", 3).evaluate(),
    "solve": lambda: isingcut.solve(isingcut.open_run("run").at(3).hamiltonian, k=2),
    "heal": lambda: heal(**HEAL),
}


@parametrize("call", DOORS.values(), ids=DOORS)
def test_python_raises_one_of_our_errors(arena, monkeypatch, call):
    for name in ("runs.context.resolve", "healing.heal.resolve", "ising.solvers.make"):
        monkeypatch.setattr(f"isingcut.{name}", in_torch)
    words = f"this machine .*: {4 * TOO_MANY:,} more bytes"
    with refuses(words, MemoryExhaustedError):
        call()
    assert not (arena.here / "new").exists()


def reads(monkeypatch):
    with catch_errors("the model"):
        in_torch()


def runs_on_text(monkeypatch):
    with catch_text_errors(torch.nn.Linear(1, 1)):
        in_torch()


def reloads(monkeypatch):
    monkeypatch.setattr(verify, "load_plain", in_torch)
    verify.reload("model", dtype=torch.float32)


def generates(monkeypatch):
    model = SimpleNamespace(generate=in_torch)
    verify.check_generation(model, torch.zeros((1, 2), dtype=torch.long), 1, "model")


@parametrize("step", [reads, runs_on_text, reloads, generates])
def test_no_library_or_model_is_blamed(monkeypatch, step):
    with pytest.raises(MemoryExhaustedError):
        step(monkeypatch)
