"""A run that is killed while it measures has finished nothing, and goes on to the same bits."""

import os
import signal

import pytest

import isingcut
from isingcut.files.journal import Journal
from isingcut.files.writing import read_json
from journals import count_rows
from ranks import join, say_into, start
from shared import OPTIONS

pytestmark = pytest.mark.usefixtures("no_speed")


def _killed(verb, options, said, name, key, count):
    """In a process of its own: killed behind the row of that number, of a name and a key or any."""
    say_into(said)
    put, rows = Journal.put, []

    def put_and_die(self, row_key, row):
        put(self, row_key, row)
        if row_key.startswith(key) and (not name or self._path.name.startswith(name)):
            rows.append(row_key)
            if len(rows) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    Journal.put = put_and_die
    getattr(isingcut, verb)(**options)


def options(llama, text, out, **more):
    """Of a run that measures many micro-batches."""
    return {
        **OPTIONS, "model": str(llama), "remove": 2, "calibration": str(text), "out": str(out),
        "batch_tokens": 16, **more,
    }  # fmt: skip


@pytest.mark.parametrize("count", [2, 25])
def test_a_killed_search_goes_on_to_the_same_bits(llama, text, shared, tmp_path, count):
    def make(out):
        return isingcut.energy(**options(llama, text, out, attention="sdpa"))

    whole = shared.folder("searched", make)
    out, said = tmp_path / "killed", tmp_path / "said"
    typed = options(llama, text, out, attention="sdpa")
    process = start(_killed, "energy", typed, said, "", "", count)
    assert join([process]) == [-signal.SIGKILL], said.read_text()
    assert not (out / "hamiltonian.safetensors").exists()
    assert list(out.glob("*.journal"))
    make(out)
    name = "hamiltonian.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(out.glob("*.journal*"))


@pytest.mark.parametrize(
    ("name", "missing"), [("hamiltonian", "hamiltonian.safetensors"), ("candidates", "model")]
)
def test_kill_9_leaves_nothing_finished_and_a_second_call_the_same_bits(
    llama, text, shared, tmp_path, name, missing
):
    def make(out):
        return isingcut.run(**options(llama, text, out, energy="pairwise"))

    whole = shared.folder("never-killed", make)
    out, said = tmp_path / "killed", tmp_path / "said"
    typed = options(llama, text, out, energy="pairwise")
    process = start(_killed, "run", typed, said, name, "1:", 1)
    assert join([process]) == [-signal.SIGKILL], said.read_text()
    assert read_json(out / "run.json", "run")["complete"] is False
    assert not (out / missing).exists()
    assert not (out / "model").exists()
    journal = next(out.glob("*.journal"))
    assert count_rows(journal) == 2, "two finished micro-batches"
    make(out)
    for file in ("hamiltonian.safetensors", "model/model.safetensors", "candidates.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert not list(out.glob("*.journal*"))
    assert read_json(out / "run.json", "run")["complete"] is True
