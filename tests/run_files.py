"""Run folders written file by file, for tests that only read them: no model, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.files.outputs import file_sha256
from isingcut.files.writing import read_json, write_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig
from isingcut.report import card
from isingcut.report import write as report

KINDS = ("attention+mlp", "mamba2", "attention+mlp", "moe")


def record(folder: Path) -> None:
    """Let `run.json` say that all its run's files are there, finished, and as they are now."""
    run = read_json(folder / "run.json", "run")
    stages = run["stages"]
    parts = [p for p in folder.rglob("*") if _stage_of(p) and "model" not in p.parts[:-1]]
    for path in parts:
        if path.is_dir() and not (path / "isingcut.json").exists():
            continue
        key = path.relative_to(folder).as_posix()
        stages[key] = {**_done(_stage_of(path)), **stages.get(key, {}), "done": True}
        if path.is_dir():
            removed = json.loads((path / "isingcut.json").read_text(encoding="utf-8"))["removed"]
            stages[key]["options"] = {"removed": removed}
        elif path.is_file():
            stages[key]["sha256"] = file_sha256(path)
    if (folder / "healing.json").exists():
        stages["healed"] = _done("heal")
    content = {k: v for k, v in run.items() if k not in ("format", "version")}
    write_json(folder / "run.json", "run", content)


def _done(stage: str) -> dict[str, Any]:
    return {"stage": stage, "fingerprint": "", "options": {}, "seconds": 0.5, "done": True}


def write_report(folder: Path, target: Path | None = None) -> None:
    """`report.write_report` of a folder that was written by hand."""
    record(folder)
    report.write_report(folder, target)


def model_card(folder: Path, target: Path, removed: list[int]) -> str:
    """`card.model_card` of a folder that was written by hand."""
    record(folder)
    return card.model_card(card.card_parts(folder, target, removed))


def write_comparison(
    folders: list[tuple[Path, Path]], out: Path, *, overwrite: bool = False
) -> list[str]:
    """`report.write_comparison` of folders that were written by hand."""
    for folder, _ in folders:
        record(folder)
    return report.write_comparison(folders, out, overwrite=overwrite)


def _stage_of(path: Path) -> str:
    """The stage that writes a file of that name; empty for none."""
    known = {
        "spectrum.json": "solve",
        "candidates.json": "rank",
        "healed-candidates.json": "heal",
        "evaluation.json": "evaluate",
        "benchmarks.json": "benchmarks",
        "model": "excise",
    }
    if path.name.startswith("hamiltonian."):
        return "energy"
    return "baseline" if path.name.startswith("baseline-") else known.get(path.name, "")


def fidelity(value: float, n: int) -> dict[str, Any]:
    low, high = value - 0.1, min(1.0, value + 0.05)
    return {
        "n": n,
        **{
            f"{name}{end}": v
            for name in ("spearman", "kendall")
            for end, v in (("", value), ("_low", low), ("_high", high))
        },
    }


def side(perplexity: float, blocks: int, speed: float) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "perplexity_se": 0.5,
        "nll": float(np.log(perplexity)),
        "nll_se": 0.025,
        "parameters": 10**6 * (blocks + 2),
        "bytes": 2 * 10**6 * (blocks + 2),
        "blocks": blocks,
        "prefill_tokens_per_second": 8 * speed,
        "decode_tokens_per_second": speed,
        "peak_memory_bytes": 5 * 10**8,
    }


def hamiltonian(n: int, seed: int, unit: str = "nats/token") -> Hamiltonian:
    rng = np.random.default_rng(seed)
    coupling = np.triu(0.05 * rng.standard_normal((n, n)), 1)
    h = 0.2 + rng.random(n) + np.where(np.arange(n) == 0, 5.0, 0.0)
    error = np.triu(np.full((n, n), 0.01), 1)
    meta = {"energy": "pairwise", "loss": "KL(original || cut)", "samples": 4, "tokens": 40}
    return Hamiltonian(
        h, coupling + coupling.T, 0.0, unit, meta, np.full(n, 0.02), error + error.T
    )  # fmt: skip


def write_removal(
    place: Path, energy: Hamiltonian, m: int, *, ranked: bool = True, evaluated: bool = True
) -> list[int]:
    """`spectrum.json` and what follows it, for m of the blocks; the chosen state."""
    n, rng = energy.n, np.random.default_rng(m)
    # Blocks that cost little alone, in every combination of a few: low states without a solver.
    cheap = np.argsort(energy.h)[: m + 6]
    picks = {tuple(sorted(rng.choice(cheap, m, replace=False).tolist())) for _ in range(200)}
    states = np.zeros((len(picks), n), dtype=bool)
    for row, pick in zip(states, sorted(picks), strict=True):
        row[list(pick)] = True
    energies = energy.energies(states)
    order = np.argsort(energies)[:20]
    low = [np.flatnonzero(states[k]).tolist() for k in order]
    place.mkdir(exist_ok=True)
    write_json(
        place / "spectrum.json",
        "spectrum",
        {
            "n": n,
            "unit": energy.unit,
            "solver": "exact",
            "seconds": 0.5,
            "proven": True,
            "lower_bound": float(energies[order[0]]),
            "relative_gap": 0.0,
            "info": {},
            "states": [
                {"rank": r, "energy": float(energies[k]), "removed": s}
                for r, (k, s) in enumerate(zip(order, low, strict=True))
            ],
        },
    )
    random = [sorted(rng.choice(n, m, replace=False).tolist()) for _ in range(30)]

    def measured(removed: list[int]) -> dict[str, Any]:
        state = np.zeros(n, dtype=bool)
        state[removed] = True
        value = energy.energy(state)
        kl = float(value * np.exp(0.1 * rng.standard_normal()))
        return {
            "removed": removed, "energy": value, "kl": kl, "kl_se": 0.05 * kl,
            "nll": 3.0 + kl, "nll_se": 0.1,
        }  # fmt: skip

    if not ranked:
        return low[0]
    rows = [measured(s) for s in low]
    best = int(np.argmin([r["kl"] for r in rows]))
    write_json(
        place / "candidates.json",
        "candidates",
        {
            "remove": str(m),
            "unit": "nats/token",
            "energy_unit": energy.unit,
            "samples": 3,
            "tokens": 333,
            "candidates": rows,
            "random": [measured(s) for s in random],
            "fidelity": {k: fidelity(0.9, 50) for k in ("kl", "nll", "kl_random_only")},
            "fidelity_of_others": {"empirical-fisher": {"kl": fidelity(-0.25, 50)}},
            "chosen": {**rows[best], "position": best, "why": "lowest measured KL"},
            "original": {"nll": 3.0},
            "proven": True,
            "solver": "exact",
        },
    )
    (place / "model").mkdir()
    record = {"removed": low[best], "of": n, "model": {}}
    write_json(place / "model" / "isingcut.json", "removal", record)
    if evaluated:
        write_json(
            place / "evaluation.json",
            "evaluation",
            {
                "samples": 5,
                "tokens": 555,
                "before": side(20.0, n, 40.0),
                "after": side(20.0 + 3 * m, n - m, 40.0 * n / (n - m)),
                "kl": 0.3 * m,
                "kl_se": 0.01,
                "generation": {"prompt": "Why?", "before": "Because.", "after": "So ``` so."},
                "device": "cpu",
                "dtype": "float32",
            },
        )
    return low[best]


def baseline(name: str, removed: list[int], kl: float, **more: Any) -> dict[str, Any]:
    return {
        "baseline": name, "options": {}, "settings": [], "removed": removed, "merges": [],
        "kl": kl, "kl_se": 0.05, "nll": 3.5, "nll_se": 0.1, "passes": 12.5, "heads": 0,
        "tokens_searched": 1000, "tokens_judged": 333, "violated": [], "info": {}, **more,
    }  # fmt: skip


def healing(steps: list[dict[str, Any]], removed: list[int], n: int) -> dict[str, Any]:
    def scores(perplexity: float, kl: float) -> dict[str, Any]:
        return {
            "perplexity": perplexity, "perplexity_se": 0.5, "nll": float(np.log(perplexity)),
            "nll_se": 0.02, "kl": kl, "kl_se": 0.01, "original_perplexity": 20.0,
        }  # fmt: skip

    return {
        "steps": steps, "before": scores(29.0, 0.9), "after": scores(24.0, 0.5),
        "removed": removed, "of": n, "report_samples": 3, "report_tokens": 333,
        "tokens_seen": steps[-1]["tokens"] if steps else 0,
        "options": {"patch": "none", "method": "lora"},
    }  # fmt: skip


def write_run(
    path: Path,
    *,
    n: int = 12,
    m: int = 3,
    seed: int = 0,
    energy: str = "pairwise",
    model: str = "a-model",
    extras: bool = True,
    unit: str = "nats/token",
) -> Path:
    """A finished run of m of n blocks; with ``extras`` everything else a report can show."""
    path.mkdir(parents=True)
    options = {f: getattr(RunConfig(), f) for f in ("calibration", "linear", "keep", "budget")}
    made = {"fingerprint": "0", "options": {"remove": str(m)}, "done": True, "seconds": 0.5}
    stages = {
        "calibration.safetensors": {**made, "stage": "calibration", "seconds": 1.25},
        "spectrum.json": {**made, "stage": "solve"},
    }
    for k in (m - 1, m + 2):
        solved = {**made, "stage": "solve", "options": {"remove": str(k)}}
        stages[f"remove-{k}/spectrum.json"] = solved
    blocks = [
        {
            "index": i,
            "kind": KINDS[i % len(KINDS)],
            "parameters": 10**6,
            "bytes": 2 * 10**6,
            "kv_bytes_per_token": 512 if "attention" in KINDS[i % len(KINDS)] else 0,
        }
        for i in range(n)
    ]
    write_json(
        path / "run.json",
        "run",
        {
            "config": {
                "model": model, "remove": str(m), "energy": energy, "seed": seed, **options,
            },
            "stages": stages,
            "blocks": {
                "path": "model.layers", "blocks": blocks, "total_parameters": 10**6 * (n + 2),
                "total_bytes": 2 * 10**6 * (n + 2), "legality": [],
            },
            "provenance": {
                "isingcut": "0.1.0",
                "python": "3.11.0",
                "torch": "2.9.0",
                "transformers": "5.10.0",
                "platform": "Linux",
                "cpu": "a CPU",
                "command_line": f"isingcut run {model} --remove {m} --out {path.name}",
                "created": "2026-01-01T00:00:00Z",
                "model": {"name": model, "sha256": f"sha-of-{model}", "weight_bytes": 8},
                "calibration": {
                    "source": "wiki",
                    "sha256": f"text-{seed}",
                    "splits": {"energy": {"samples": 4, "tokens": 40}},
                },
            },
            "complete": True,
        },
    )  # fmt: skip
    main = hamiltonian(n, 1, unit)
    main.save(path / "hamiltonian.safetensors")
    chosen = write_removal(path, main, m)
    if not extras:
        record(path)
        return path
    hamiltonian(n, 2, "arbitrary").save(path / "hamiltonian.empirical-fisher.safetensors")
    write_removal(path / f"remove-{m - 1}", main, m - 1)
    write_removal(path / f"remove-{m + 2}", main, m + 2, ranked=False)
    other = [b for b in range(n) if b not in chosen][:m]
    for name, kl, more in (
        ("sleb", 2.5, {"settings": ["loss=kl"]}),
        ("random", 9.0, {"violated": ["keep 0"]}),
    ):
        write_json(path / f"baseline-{name}.json", "baseline", baseline(name, other, kl, **more))
    steps = [{"step": k, "tokens": 512 * k, "loss": 1.0 / k} for k in range(1, 31)]
    write_json(path / "healing.json", "healing", healing(steps, chosen, n))
    scores = [
        {
            "task": task, "metric": "acc", "original": a, "original_se": 0.02, "cut": b,
            "cut_se": 0.02, "n": 500, "shots": 0, "difference": b - a,
            "difference_low": b - a - 0.03, "difference_high": b - a + 0.03, "p_value": 0.04,
            "test": "mcnemar", "more_than_noise": abs(b - a) > 0.03,
        }
        for task, a, b in (("arc_easy", 0.62, 0.55), ("piqa", 0.7, 0.66), ("boolq", 0.6, 0.61))
    ]  # fmt: skip
    text = {
        "tokens": 777, "original": side(15.0, 1, 1.0), "cut": side(18.0, 1, 1.0), "kl": 0.2,
    }  # fmt: skip
    write_json(
        path / "benchmarks.json",
        "benchmarks",
        {"rows": scores, "engine": "lm_eval 0.4", "wikitext2": text},
    )
    record(path)
    return path
