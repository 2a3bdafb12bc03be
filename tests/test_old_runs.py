"""A run folder as an earlier version of the same file formats wrote it still opens."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from isingcut.files.writing import read_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.report.write import write_report
from shared import call

# Written by commit e3a11f7 for a model of six tiny blocks; a few of its states.
DOCUMENTS = json.loads(Path(__file__).with_name("old_run.json").read_text(encoding="utf-8"))
KINDS = {
    "run.json": "run",
    "spectrum.json": "spectrum",
    "candidates.json": "candidates",
    "evaluation.json": "evaluation",
    "model/isingcut.json": "removal",
}
META = {"energy": "fisher", "gate": "sublayer", "label_seed": 0, "loss": "KL(original || gated)"}
HEADER = {
    "format": "isingcut-hamiltonian",
    "meta": {**META, "samples": 256, "tokens": 3840},
    "unit": "nats/token",
    "version": 1,
}


@pytest.fixture
def old(tmp_path):
    """The folder, with the hashes of its files in run.json; folders had none."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    tensors = {"h": np.arange(6.0), "J": np.zeros((6, 6)), "c": np.zeros(1)}
    header = {"isingcut": json.dumps(HEADER, sort_keys=True)}
    for name in ("hamiltonian.safetensors", "hamiltonian.fisher.safetensors"):
        save_file(tensors, folder / name, header)
    for name, content in DOCUMENTS.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    run = copy.deepcopy(DOCUMENTS["run.json"])
    for name, record in run["stages"].items():
        file = folder / name
        plain = file.is_file()
        record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest() if plain else None
    (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    return folder


def test_every_file_of_it_is_read(old):
    for name, kind in KINDS.items():
        assert read_json(old / name, kind)["format"] == f"isingcut-{kind}"
    assert Hamiltonian.load(old / "hamiltonian.safetensors").meta["energy"] == "fisher"
    assert Spectrum.load(old / "spectrum.json").removed(0) == [4, 5]


def test_it_is_reported_and_its_choice_handed_on(old, capsys):
    write_report(old)
    assert "model without 2 of its 6 blocks" in (old / "report.md").read_text(encoding="utf-8")
    assert call("solve", old, "--remove", 2, "--quiet") == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(old / "spectrum.json")


def test_a_solver_that_is_gone_is_said_where_it_is_asked_for(old, capsys):
    run = json.loads((old / "run.json").read_text(encoding="utf-8"))
    run["config"]["solver"] = "anneal"
    (old / "run.json").write_text(json.dumps(run), encoding="utf-8")
    write_report(old)
    assert call("solve", old, "--remove", 3) == 2
    said = capsys.readouterr().err
    assert "there is no solver 'anneal' any more; use dimod:dwave.samplers" in said
    assert len(said.splitlines()) == 1
