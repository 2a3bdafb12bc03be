"""A small finished run written file by file, each of its figures known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isingcut.files.writing import read_json, write_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig

N = 12
STATES = [[2, 3], [3, 4], [10, 11]]


def correlation(value: float | None, low: float | None, n: int = 33) -> dict[str, Any]:
    return {
        "spearman": value,
        "spearman_low": low,
        "spearman_high": None if value is None else min(1.0, value + 0.05),
        "kendall": value,
        "kendall_low": low,
        "kendall_high": value,
        "n": n,
    }


def measured(removed: list[int], k: int) -> dict[str, Any]:
    return {
        "removed": removed,
        "energy": 0.5 + k / 8,
        "kl": 0.4 - k / 16,
        "kl_se": 0.0625,
        "nll": 3.0,
        "nll_se": 0.1,
    }


def run_json(model: str = "smollm2", energy: str = "pairwise") -> dict[str, Any]:
    config = {f: getattr(RunConfig(), f) for f in ("seed", "calibration", "linear", "keep")}
    made = {"fingerprint": "0", "options": {"remove": "5"}, "done": True}
    stages = {
        "calibration.safetensors": {**made, "stage": "calibration", "seconds": 1.25},
        "spectrum.json": {**made, "stage": "solve", "seconds": 0.5},
        "benchmarks.json": {**made, "stage": "benchmarks", "done": False},
        "remove-5/spectrum.json": {**made, "stage": "solve", "seconds": 77.0},
    }
    block = {"kind": "attention+mlp", "parameters": 10**6, "bytes": 2 * 10**6}
    return {
        "config": {"model": model, "remove": "2", "energy": energy, **config},
        "stages": stages,
        "blocks": {
            "path": "model.layers",
            "blocks": [{"index": i, **block} for i in range(N)],
            "total_parameters": N * 10**6,
            "total_bytes": 2 * N * 10**6,
            "legality": [],
        },
        "provenance": {
            "isingcut": "0.1.0",
            "python": "3.11.0",
            "torch": "2.9.0",
            "transformers": "5.10.0",
            "platform": "Linux",
            "cpu": "a CPU | with a bar",
            "command_line": "isingcut run smollm2 --remove 2 --out r",
            "created": "2026-01-01T00:00:00Z",
            "model": {"name": model, "sha256": "aa11", "weight_bytes": 8},
            "calibration": {
                "source": "wiki",
                "sha256": "bb22",
                "splits": {"energy": {"samples": 4, "tokens": 40}},
            },
        },
        "complete": True,
    }


def side(perplexity: float, blocks: int) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "perplexity_se": 0.25,
        "nll": 3.0,
        "nll_se": 0.01,
        "parameters": blocks * 10**6,
        "bytes": blocks * 2 * 10**6,
        "blocks": blocks,
        "prefill_tokens_per_second": 100.0,
        "decode_tokens_per_second": 10.0,
        "peak_memory_bytes": 5 * 10**8,
    }


def write_small_run(path: Path) -> Path:
    """A finished run, removing blocks 10 and 11: the third state of its spectrum."""
    path.mkdir()
    write_json(path / "run.json", "run", run_json())
    h = Hamiltonian(
        np.zeros(N),
        np.zeros((N, N)),
        0.0,
        unit="nats/token",
        meta={"energy": "pairwise", "loss": "KL(original || cut)", "samples": 4, "tokens": 40},
    )
    h.save(path / "hamiltonian.safetensors")
    write_json(
        path / "spectrum.json",
        "spectrum",
        {
            "n": N,
            "unit": "nats/token",
            "solver": "exhaustive",
            "seconds": 0.5,
            "proven": True,
            "lower_bound": 0.5,
            "info": {},
            "states": [
                {"rank": k, "energy": 0.5 + k / 8, "removed": s} for k, s in enumerate(STATES)
            ],
        },
    )
    rows = [measured(s, k) for k, s in enumerate(STATES)]
    write_json(
        path / "candidates.json",
        "candidates",
        {
            "remove": "2",
            "unit": "nats/token",
            "energy_unit": "nats/token",
            "samples": 3,
            "tokens": 333,
            "candidates": rows,
            "random": [measured([0, 1], 5)] * 30,
            "fidelity": {"kl": correlation(0.93, 0.81), "nll": correlation(0.9, 0.7)},
            "fidelity_of_others": {"empirical-fisher": {"kl": correlation(-0.12, -0.4)}},
            "chosen": {**rows[2], "position": 2, "why": "lowest measured KL"},
            "original": {"nll": 2.5},
            "proven": True,
            "solver": "exhaustive",
        },
    )
    (path / "model").mkdir()
    write_json(
        path / "model" / "isingcut.json", "removal", {"removed": [10, 11], "of": N, "model": {}}
    )
    write_json(
        path / "evaluation.json",
        "evaluation",
        {
            "samples": 5,
            "tokens": 555,
            "before": side(20.0, 12),
            "after": side(25.0, 10),
            "kl": 0.3125,
            "kl_se": 0.0125,
            "generation": {"prompt": "Why?", "before": "Because.", "after": "So ``` so."},
            "device": "cpu",
            "dtype": "float32",
        },
    )
    return path


def change(path: Path, kind: str, **values: Any) -> None:
    document = read_json(path, kind)
    write_json(path, kind, {**document, **values})


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def patch(**more: Any) -> dict[str, Any]:
    text = {"source": "-", "samples": 7, "searched": 4, "tokens": 700, "asked": 900, "short": ""}
    cut = {"removed": [3, 4], "block": 2, "layer": "mlp.down_proj", "held_out_error_left": 0.4}
    proof = {"inputs": "text", "difference": 1e-7, "remarks": []}
    found = {"cuts": [cut], "changed": True, "unpatched": [], "text": text, "proof": proof}
    return {**found, **more}
