"""A run folder as an earlier version of the same file formats wrote it still opens."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from isingcut.cli import main as cli
from isingcut.files.writing import read_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.spectrum import Spectrum
from isingcut.report.write import write_report

# Written by commit e3a11f7 for a model of six tiny blocks; a few of its states.
DOCUMENTS = {
    "run.json": r"""
{"format": "isingcut-run", "version": 1, "config": {"model": "model", "remove": "2",
"calibration": "text.txt", "samples": 3, "length": 16, "rank_samples": 3, "report_samples": 3,
"seed": 0, "energy": "refined", "also": "fisher", "effort": "", "linear": false, "dtype":
"float32", "device": "auto", "attention": "auto", "batch_tokens": null, "stream": "auto",
"memory_limit": "", "trust_remote_code": false, "solver": "auto", "states": 20, "budget": "",
"diverse": 0, "solve_seconds": 60.0, "keep": "", "drop": "", "random_states": 30, "choose":
"measured", "patch": "none", "heal": false, "heal_top": 0, "heal_options": ""}, "stages": {
"calibration.safetensors": {"stage": "calibration", "fingerprint": "71a2d50f71423d29", "options"
: {"calibration": "text.txt", "length": 16, "rank_samples": 3, "report_samples": 3, "seed": 0,
"samples": 256}, "done": true, "seconds": 0.001}, "hamiltonian.safetensors": {"stage": "energy"
, "fingerprint": "c43e5c8dc23040b0", "options": {"calibration": "71a2d50f71423d29", "energy":
"refined", "options":
"Refined(targets=(Target(2: count (exactly 2 of 6 blocks removed)),), effort='', seed=0)",
"samples": 3, "dtype": "torch.float32"}, "done": true, "seconds": 8.002},
"hamiltonian.fisher.safetensors": {"stage": "energy", "fingerprint": "c605efab95e8d866",
"options": {"calibration": "71a2d50f71423d29", "energy": "fisher", "options":
"Fisher(gate='sublayer', seed=0)", "samples": 256, "dtype": "torch.float32"}, "done": true,
"seconds": 0.272}, "spectrum.json": {"stage": "solve", "fingerprint": "0071eb73a72ef3fd",
"options": {"energy": "c43e5c8dc23040b0", "remove": "2", "budget": "", "keep": "", "drop": "",
"solver": "auto", "states": 20, "diverse": 0, "seed": 0}, "done": true, "seconds": 1.231},
"candidates.json": {"stage": "rank", "fingerprint": "f24d30762dc43d0a", "options": {"energy":
"c43e5c8dc23040b0", "remove": "2", "budget": "", "keep": "", "drop": "", "solver": "auto",
"states": 20, "diverse": 0, "seed": 0, "random_states": 30, "choose": "measured", "also":
["fisher"]}, "done": true, "seconds": 1.776}, "model": {"stage": "excise", "fingerprint":
"b6f24c63c9d74ee1", "options": {"removed": [4, 5]}, "done": true, "seconds": 0.202},
"evaluation.json": {"stage": "evaluate", "fingerprint": "22f934911020ee85", "options": {"model"
: "b6f24c63c9d74ee1", "calibration": "71a2d50f71423d29"}, "done": true, "seconds": 1.231}},
"blocks": {"path": "model.layers", "blocks": [{"index": 0, "path": "model.layers.0", "kind":
"attention+mlp", "parameters": 7744, "bytes": 30976, "active_parameters": 7744,
"kv_bytes_per_token": 128, "state_bytes": 0, "latency_seconds": 0.000412631}, {"index": 1,
"path": "model.layers.1", "kind": "attention+mlp", "parameters": 7744, "bytes": 30976,
"active_parameters": 7744, "kv_bytes_per_token": 128, "state_bytes": 0, "latency_seconds":
0.000407674}, {"index": 2, "path": "model.layers.2", "kind": "attention+mlp", "parameters": 7744
, "bytes": 30976, "active_parameters": 7744, "kv_bytes_per_token": 128, "state_bytes": 0,
"latency_seconds": 0.000402456}, {"index": 3, "path": "model.layers.3", "kind": "attention+mlp"
, "parameters": 7744, "bytes": 30976, "active_parameters": 7744, "kv_bytes_per_token": 128,
"state_bytes": 0, "latency_seconds": 0.000408976}, {"index": 4, "path": "model.layers.4", "kind"
: "attention+mlp", "parameters": 7744, "bytes": 30976, "active_parameters": 7744,
"kv_bytes_per_token": 128, "state_bytes": 0, "latency_seconds": 0.000402276}, {"index": 5,
"path": "model.layers.5", "kind": "attention+mlp", "parameters": 7744, "bytes": 30976,
"active_parameters": 7744, "kv_bytes_per_token": 128, "state_bytes": 0, "latency_seconds":
0.00045914}], "total_parameters": 63264, "total_bytes": 253056, "legality": []}, "provenance": {
"isingcut": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.24.0",
"numpy": "2.4.6", "safetensors": "0.8.0", "numba": "0.68.1", "dimod": "0.12.23", "platform":
"Linux-6.18.44-fc-v669-x86_64-with-glibc2.41", "cpu": "AMD EPYC", "command_line": "mk.py",
"created": "2026-11-25T17:21:35Z", "model": {"sha256":
"dbe4a0de1a84aca6fc965dd3ec0ca5283adaa0d6f5e8676630ca2561b8680450", "weight_bytes": 258880,
"name": "model"}, "calibration": {"source": "text.txt", "sha256":
"b7739854cde861dcc25f5700d8903bbb8d51e2bc26ca345cb1fcfac1a35eb891", "splits": {"energy": {
"samples": 256, "tokens": 3840}, "rank": {"samples": 3, "tokens": 45}, "report": {"samples": 3,
"tokens": 45}}}, "computed": {"cpu": {"asked": {"attention": "auto", "batch_tokens": null},
"attention": null, "batch_tokens": 1024}}}, "complete": true}""",
    "spectrum.json": r"""
{"format": "isingcut-spectrum", "version": 1, "n": 6, "unit": "nats/token", "solver": "auto",
"seconds": 1.22896, "proven": true, "lower_bound": 0.233906, "relative_gap": 0.0, "info": {
"states_visited": 15, "chosen": "exhaustive"}, "states": [{"rank": 0, "energy": 0.233906,
"removed": [4, 5]}, {"rank": 1, "energy": 0.251562, "removed": [3, 5]}, {"rank": 2, "energy":
0.37014, "removed": [3, 4]}]}""",
    "candidates.json": r"""
{"format": "isingcut-candidates", "version": 1, "remove": "2", "unit": "nats/token",
"energy_unit": "nats/token", "samples": 3, "tokens": 45, "candidates": [{"removed": [4, 5],
"energy": 0.233906, "kl": 0.216841, "kl_se": 0.0317894, "nll": 6.17864, "nll_se": 0.146512}, {
"removed": [3, 5], "energy": 0.251562, "kl": 0.372114, "kl_se": 0.0565897, "nll": 6.17752,
"nll_se": 0.197}, {"removed": [3, 4], "energy": 0.37014, "kl": 0.269014, "kl_se": 0.0247829,
"nll": 5.90542, "nll_se": 0.26519}], "random": [], "random_distribution":
"uniform over the feasible states", "fidelity": {"kl": {"n": 15, "spearman": 0.682143,
"spearman_low": 0.171457, "spearman_high": 0.941507, "kendall": 0.52381, "kendall_low": 0.115423
, "kendall_high": 0.849542}, "nll": {"n": 15, "spearman": 0.0535714, "spearman_low": -0.575989,
"spearman_high": 0.793677, "kendall": 0.104762, "kendall_low": -0.428716, "kendall_high":
0.673633}, "kl_random_only": {"n": 0, "spearman": null, "spearman_low": null, "spearman_high":
null, "kendall": null, "kendall_low": null, "kendall_high": null}}, "fidelity_of_others": {
"fisher": {"kl": {"n": 15, "spearman": 0.892857, "spearman_low": 0.670796, "spearman_high":
0.970595, "kendall": 0.714286, "kendall_low": 0.494944, "kendall_high": 0.899015}, "nll": {"n":
15, "spearman": 0.0178571, "spearman_low": -0.575751, "spearman_high": 0.656716, "kendall":
-0.00952381, "kendall_low": -0.489796, "kendall_high": 0.469388}, "kl_random_only": {"n": 0,
"spearman": null, "spearman_low": null, "spearman_high": null, "kendall": null, "kendall_low":
null, "kendall_high": null}}}, "chosen": {"removed": [4, 5], "energy": 0.233906, "kl": 0.216841
, "kl_se": 0.0317894, "nll": 6.17864, "nll_se": 0.146512, "position": 0, "why":
"lowest measured KL"}, "original": {"nll": 5.99743}, "proven": true, "solver": "auto and search"
}""",
    "evaluation.json": r"""
{"format": "isingcut-evaluation", "version": 1, "samples": 3, "tokens": 45, "before": {
"perplexity": 420.209, "perplexity_se": 78.2469, "nll": 6.04075, "nll_se": 0.18621, "parameters"
: 63264, "bytes": 258880, "blocks": 6, "prefill_tokens_per_second": 6331.36,
"decode_tokens_per_second": 535.686, "peak_memory_bytes": 1}, "after": {"perplexity": 455.304,
"perplexity_se": 71.1033, "nll": 6.12097, "nll_se": 0.156167, "parameters": 47776, "bytes":
195072, "blocks": 4, "prefill_tokens_per_second": 8224.39, "decode_tokens_per_second": 730.419,
"peak_memory_bytes": 1}, "kl": 0.198371, "kl_se": 0.0103187, "generation": {"prompt":
"Explain in two sentences why the sky is blue.", "before": "a", "after": "b"}, "device": "cpu",
"dtype": "float32", "threads": 1}""",
    "model/isingcut.json": r"""
{"format": "isingcut-removal", "version": 1, "removed": [4, 5], "of": 6, "model": {"sha256":
"dbe4a0de1a84aca6fc965dd3ec0ca5283adaa0d6f5e8676630ca2561b8680450", "weight_bytes": 258880,
"name": "model"}}""",
}
KINDS = {
    "run.json": "run",
    "spectrum.json": "spectrum",
    "candidates.json": "candidates",
    "evaluation.json": "evaluation",
    "model/isingcut.json": "removal",
}
HEADER = {
    "format": "isingcut-hamiltonian",
    "meta": {
        "energy": "fisher",
        "gate": "sublayer",
        "label_seed": 0,
        "loss": "KL(original || gated)",
        "samples": 256,
        "tokens": 3840,
    },
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
        (folder / name).write_text(content, encoding="utf-8")
    run = json.loads(DOCUMENTS["run.json"])
    for name, record in run["stages"].items():
        file = folder / name
        plain = file.is_file()
        record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest() if plain else None
    (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_file_of_it_is_read(old, name, kind):
    assert read_json(old / name, kind)["format"] == f"isingcut-{kind}"


def test_its_tensors_and_states_are_read(old):
    assert Hamiltonian.load(old / "hamiltonian.safetensors").meta["energy"] == "fisher"
    assert Spectrum.load(old / "spectrum.json").removed(0) == [4, 5]


def test_it_is_reported(old):
    write_report(old)
    assert "model without 2 of its 6 blocks" in (old / "report.md").read_text(encoding="utf-8")


def test_its_choice_is_handed_on(old, monkeypatch, capsys):
    words = ["isingcut", "solve", str(old), "--remove", "2", "--quiet"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(old / "spectrum.json")


def test_a_solver_that_is_gone_is_said_where_it_is_asked_for(old, monkeypatch, capsys):
    run = json.loads((old / "run.json").read_text(encoding="utf-8"))
    run["config"]["solver"] = "anneal"
    (old / "run.json").write_text(json.dumps(run), encoding="utf-8")
    write_report(old)
    monkeypatch.setattr("sys.argv", ["isingcut", "solve", str(old), "--remove", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "there is no solver 'anneal' any more; use dimod:dwave.samplers" in said
    assert len(said.splitlines()) == 1
