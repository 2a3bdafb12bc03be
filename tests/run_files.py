"""Run folders written file by file, for tests that only read them: no model, no torch."""

import numpy as np

from isingcut.files.ownership import file_sha256
from isingcut.files.results import write_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig
from isingcut.report import card
from isingcut.report import write as report
from shared import load_json, save_json

KINDS = ("attention+mlp", "mamba2", "attention+mlp", "moe")
_STAGES = {
    "spectrum.json": "solve",
    "candidates.json": "rank",
    "evaluation.json": "evaluate",
    "benchmarks.json": "benchmarks",
    "model": "excise",
}


def change(path, **values):
    """Rewrite a results file with other values."""
    save_json(path, {**load_json(path), **values})


def record(folder):
    """Record all files of the run in `run.json` as finished, with their present hashes."""
    stages = load_json(folder / "run.json").stages
    for path in folder.rglob("*"):
        stage = (
            "energy"
            if path.name.startswith("hamiltonian.")
            else _STAGES.get(path.name, "")
        )
        stage = "baseline" if path.name.startswith("baseline-") else stage
        cut = path / "isingcut.json"
        if (
            not stage
            or "model" in path.parts[:-1]
            or (path.is_dir() and not cut.exists())
        ):
            continue
        key = path.relative_to(folder).as_posix()
        stages[key] = {**_done(stage), **stages.get(key, {}), "done": True}
        if path.is_dir():
            removed = load_json(cut).removed
            stages[key]["options"] = {"removed": removed}
        else:
            stages[key]["sha256"] = file_sha256(path)
    if (folder / "healing.json").exists():
        stages["healed"] = _done("heal")
    change(folder / "run.json", stages=stages)


def _done(stage, seconds=0.5, **options):
    made = {"stage": stage, "fingerprint": "0", "options": options}
    return {**made, "seconds": seconds, "done": True}


def write_report(folder, target=None):
    """Record the files of a folder written by hand, and call `report.write_report`."""
    record(folder)
    report.write_report(folder, target)


def first_part(page):
    """Return the part of a page that one sees first."""
    return page.partition('<header class="top">')[2].partition(
        '<section id="compared"'
    )[0]


def model_card(folder, removed, **patch):
    """Return `card.model_card` of a folder written by hand."""
    return card.model_card(card_parts(folder, removed).model_copy(update=patch))


def card_parts(folder, removed):
    """Record the files of such a folder, and return its `card.card_parts`."""
    record(folder)
    return card.card_parts(folder, folder, removed)


def write_comparison(folders, out, *, overwrite=False):
    """Record the files of folders written by hand, and call `report.write_comparison`."""
    for folder, _ in folders:
        record(folder)
    return report.write_comparison(folders, out, overwrite=overwrite)


def fidelity(value, n, low=None):
    low = value - 0.1 if low is None and value is not None else low
    high = None if value is None else min(1.0, value + 0.05)
    ends = (("", value), ("_low", low), ("_high", high))
    return {"n": n, **{f"spearman{end}": v for end, v in ends}}


def text_scores(perplexity, **more):
    nll = {"nll": float(np.log(perplexity)), "nll_se": 0.025}
    return {"perplexity": perplexity, "perplexity_se": 0.5, **nll, **more}


def side(perplexity, blocks, speed):
    sizes = {"parameters": 10**6 * (blocks + 2), "bytes": 2 * 10**6 * (blocks + 2)}
    speeds = {"prefill_tokens_per_second": 8 * speed, "decode_tokens_per_second": speed}
    memory = {"peak_memory_bytes": 5 * 10**8}
    return text_scores(perplexity, blocks=blocks, **sizes, **speeds, **memory)


def hamiltonian(n, seed, unit="nats/token"):
    rng = np.random.default_rng(seed)
    coupling = np.triu(0.05 * rng.standard_normal((n, n)), 1)
    h = 0.2 + rng.random(n) + np.where(np.arange(n) == 0, 5.0, 0.0)
    error = np.triu(np.full((n, n), 0.01), 1)
    meta = {
        "energy": "pairwise",
        "loss": "KL(original || cut)",
        "samples": 4,
        "tokens": 40,
    }
    return Hamiltonian(
        h, coupling + coupling.T, 0.0, unit, meta, np.full(n, 0.02), error + error.T
    )  # fmt: skip


def write_removal(place, energy, m, *, ranked=True):
    """Write `spectrum.json`, and all later files if ranked, for m blocks; return the choice."""
    n = energy.n
    rng = np.random.default_rng(m)
    # Random picks among the blocks of lowest h, a few more than m: low states without a solver.
    cheap = np.argsort(energy.h)[: m + 6]
    picks = {
        tuple(sorted(rng.choice(cheap, m, replace=False).tolist())) for _ in range(200)
    }
    states = np.zeros((len(picks), n), dtype=bool)
    for row, pick in zip(states, sorted(picks), strict=True):
        row[list(pick)] = True
    energies = energy.energies(states)
    order = np.argsort(energies)[:20]
    low = [np.flatnonzero(states[k]).tolist() for k in order]
    place.mkdir(exist_ok=True)
    solved = {
        "solver": "exact",
        "seconds": 0.5,
        "proven": True,
        "info": {},
        "relative_gap": 0.0,
    }
    levels = [
        {"rank": r, "energy": float(energies[k]), "removed": s}
        for r, (k, s) in enumerate(zip(order, low, strict=True))
    ]
    lowest = levels[0]["energy"]
    found = {
        "n": n,
        "unit": energy.unit,
        **solved,
        "lower_bound": lowest,
        "states": levels,
    }
    write_json(place / "spectrum.json", "spectrum", found)
    random = [sorted(rng.choice(n, m, replace=False).tolist()) for _ in range(30)]

    def measured(removed):
        state = np.zeros(n, dtype=bool)
        state[removed] = True
        value = energy.energy(state)
        kl = float(value * np.exp(0.1 * rng.standard_normal()))
        losses = {"kl": kl, "kl_se": 0.05 * kl, "nll": 3.0 + kl, "nll_se": 0.1}
        return {"removed": removed, "energy": value, **losses}

    if not ranked:
        return low[0]
    rows = [measured(s) for s in low]
    best = int(np.argmin([r["kl"] for r in rows]))
    ranking = {
        "remove": str(m),
        "unit": "nats/token",
        "energy_unit": energy.unit,
        "samples": 3,
        "tokens": 333,
        "candidates": rows,
        "random": [measured(s) for s in random],
        "random_tokens": 333,
        "fidelity": {k: fidelity(0.9, 50) for k in ("kl", "nll", "kl_random_only")},
        "fidelity_of_others": {"empirical-fisher": {"kl": fidelity(-0.25, 50)}},
        "chosen": {**rows[best], "position": best, "why": "lowest measured KL"},
        "proven": True,
    }
    write_json(place / "candidates.json", "candidates", ranking)
    (place / "model").mkdir()
    cut = {"removed": low[best], "of": n, "model": {}}
    write_json(place / "model/isingcut.json", "removal", cut)
    evaluation = {
        "samples": 5,
        "tokens": 555,
        "before": side(20.0, n, 40.0),
        "after": side(20.0 + 3 * m, n - m, 40.0 * n / (n - m)),
        "kl": 0.3 * m,
        "kl_se": 0.01,
        "generation": {"prompt": "Why?", "before": "Because.", "after": "So ``` so."},
        "device": "cpu",
        "dtype": "float32",
    }
    write_json(place / "evaluation.json", "evaluation", evaluation)
    return low[best]


def baseline(name, removed, kl, **more):
    losses = {"kl": kl, "kl_se": 0.05, "nll": 3.5, "nll_se": 0.1}
    price = {"passes": 12.5, "heads": 0, "tokens_searched": 1000, "tokens_judged": 333}
    found = {"baseline": name, "removed": removed, "violated": []}
    return {**found, **losses, **price, **more}


def patch(**more):
    text = {"source": "-", "samples": 7, "searched": 4, "tokens": 700}
    text |= {"requested": 900, "short": ""}
    cut = {
        "removed": [3, 4],
        "block": 2,
        "layer": "mlp.down_proj",
        "held_out_error_left": 0.4,
    }
    proof = {"inputs": "text", "difference": 1e-7, "remarks": []}
    found = {
        "cuts": [cut],
        "changed": True,
        "unpatched": [],
        "text": text,
        "proof": proof,
    }
    return {**found, **more}


def healing(steps, removed, n):
    return {
        "steps": steps,
        "before": text_scores(29.0, kl=0.9, kl_se=0.01, original_perplexity=20.0),
        "after": text_scores(24.0, kl=0.5, kl_se=0.01, original_perplexity=20.0),
        "removed": removed,
        "of": n,
        "report_samples": 3,
        "report_tokens": 333,
        "tokens_seen": steps[-1]["tokens"] if steps else 0,
        "options": {"patch": "none", "method": "lora"},
    }


def task(name, original, cut):
    change = cut - original
    return {
        "task": name, "metric": "acc", "original": original, "original_se": 0.02, "cut": cut,
        "cut_se": 0.02, "n": 500, "shots": 0, "difference": change,
        "difference_low": change - 0.03, "difference_high": change + 0.03, "p_value": 0.04,
        "test": "mcnemar", "more_than_noise": abs(change) > 0.03,
    }  # fmt: skip


def run_content(model, energy, n, m, seed):
    """Return the content of `run.json` before its files are recorded."""
    options = {f: getattr(RunConfig(), f) for f in ("calibration", "keep", "budget")}
    solved = {
        f"remove-{k}/spectrum.json": _done("solve", 77.0, remove=str(k))
        for k in (m - 1, m + 2)
    }
    text = _done("calibration", 1.25)
    solved |= {
        "calibration.safetensors": text,
        "spectrum.json": _done("solve", remove=str(m)),
    }
    cost = {"parameters": 10**6, "bytes": 2 * 10**6}
    blocks = [
        {
            "index": i,
            "kind": k,
            "kv_bytes_per_token": 512 if "attention" in k else 0,
            **cost,
        }
        for i in range(n)
        for k in [KINDS[i % len(KINDS)]]
    ]
    size = {f"total_{name}": (n + 2) * value for name, value in cost.items()}
    return {
        "config": {
            "model": model,
            "remove": str(m),
            "energy": energy,
            "seed": seed,
            **options,
        },
        "stages": solved,
        "blocks": {"path": "model.layers", "blocks": blocks, **size, "legality": []},
        "provenance": {
            "isingcut": "0.1.0",
            "python": "3.11.0",
            "torch": "2.9.0",
            "transformers": "5.10.0",
            "platform": "Linux",
            "cpu": "a CPU | with a bar",
            "command_line": f"isingcut run {model} --remove {m} --out run",
            "created": "2026-01-01T00:00:00Z",
            "model": {"name": model, "sha256": f"sha-of-{model}", "weight_bytes": 8},
            "calibration": {
                "source": "wiki",
                "sha256": f"text-{seed}",
                "splits": {"energy": {"samples": 4, "tokens": 40}},
            },
        },
        "complete": True,
    }


def write_run(
    path,
    *,
    n=12,
    m=3,
    seed=0,
    energy="pairwise",
    model="a-model",
    extras=True,
    unit="nats/token",
):
    """Write a finished run of m of n blocks; ``extras`` adds all else that a report can show."""
    path.mkdir(parents=True)
    write_json(path / "run.json", "run", run_content(model, energy, n, m, seed))
    main = hamiltonian(n, 1, unit)
    main.save(path / "hamiltonian.safetensors")
    chosen = write_removal(path, main, m)
    if extras:
        _write_extras(path, main, m, chosen)
    record(path)
    return path


def _write_extras(path, main, m, chosen):
    n = main.n
    hamiltonian(n, 2, "arbitrary").save(
        path / "hamiltonian.empirical-fisher.safetensors"
    )
    write_removal(path / f"remove-{m - 1}", main, m - 1)
    write_removal(path / f"remove-{m + 2}", main, m + 2, ranked=False)
    other = [b for b in range(n) if b not in chosen][:m]
    for name, kl, more in (
        ("sleb", 2.5, {}),
        ("random", 9.0, {"violated": ["keep 0"]}),
    ):
        write_json(
            path / f"baseline-{name}.json",
            "baseline",
            baseline(name, other, kl, **more),
        )
    steps = [{"step": k, "tokens": 512 * k, "loss": 1.0 / k} for k in range(1, 31)]
    write_json(path / "healing.json", "healing", healing(steps, chosen, n))
    rows = [
        task("arc_easy", 0.62, 0.55),
        task("piqa", 0.7, 0.66),
        task("boolq", 0.6, 0.61),
    ]
    text = {
        "tokens": 777,
        "original": text_scores(15.0),
        "cut": text_scores(18.0),
        "kl": 0.2,
    }
    found = {"rows": rows, "engine": "lm_eval 0.4", "wikitext2": text}
    write_json(path / "benchmarks.json", "benchmarks", found)
