"""Run folders written file by file, for tests that only read them: no model, no torch."""

import itertools
import re
from dataclasses import replace

import numpy as np

from isingcut.files.ownership import file_sha256
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import states_of
from isingcut.report import card
from isingcut.report import write as report
from isingcut.report.run_files import RunFiles
from shared import RunConfig, load_json, save_json, write_json

KINDS = ("attention+mlp", "mamba2", "attention+mlp", "moe")
# The stage of a file by the first part of its name.
_STAGES = {
    "hamiltonian": "energy",
    "baseline": "baseline",
    "spectrum": "solve",
    "candidates": "rank",
    "evaluation": "evaluate",
    "benchmarks": "benchmarks",
}


def change(path, **values):
    """Rewrite a results file with other values."""
    save_json(path, {**load_json(path), **values})


def record(folder):
    """Record all files of the run in `run.json` as finished, with their present hashes."""
    stages = load_json(folder / "run.json").stages
    for path in folder.rglob("*"):
        stage = _STAGES.get(re.split(r"[.-]", path.name)[0])
        if stage and path.is_file() and path.parent.name != "model":
            own = {"sha256": file_sha256(path)}
        elif path.match("model/isingcut.json"):
            own = {"options": {"removed": load_json(path).removed}}
            path = path.parent
        else:
            continue
        key = path.relative_to(folder).as_posix()
        made = {**_done(stage or "cut"), **stages.get(key, {})}
        stages[key] = {**made, "done": True, **own}
    if (folder / "healed/healing.json").exists():
        stages["healed"] = _done("heal")
    change(folder / "run.json", stages=stages)


def _done(stage, seconds=0.5, **options):
    made = {"stage": stage, "fingerprint": "0", "options": options}
    return {**made, "seconds": seconds, "done": True}


def write_report(folder, target=None):
    """Record the files of a folder written by hand, and call `report.write_report`."""
    record(folder)
    report.write_report(Store.open(folder), target)


def first_part(page):
    """Return the part of a page that one sees first."""
    return page.split('<header class="top">')[1].split('<section id="compared"')[0]


def model_card(folder, removed, **patch):
    """Return `card.model_card` of a folder written by hand."""
    return card.model_card(card_parts(folder, removed).model_copy(update=patch))


def card_parts(folder, removed):
    """Record the files of such a folder, and return its `card.card_parts`."""
    record(folder)
    return card.card_parts(files_of(folder), removed)


def files_of(folder):
    """Return the files of a run folder."""
    return RunFiles(Store.open(folder))


def write_comparison(folders, out, *, overwrite=False):
    """Record the files of folders written by hand, and call `report.write_comparison`."""
    for folder, _ in folders:
        record(folder)
    places = [(Store.open(folder), target) for folder, target in folders]
    return report.write_comparison(places, out, overwrite=overwrite)


def fidelity(value, n, low=None):
    low = value - 0.1 if low is None and value is not None else low
    high = None if value is None else min(1.0, value + 0.05)
    return {"n": n, "spearman": value, "spearman_low": low, "spearman_high": high}


def text_scores(perplexity, **more):
    nll = {"nll": float(np.log(perplexity)), "nll_se": 0.025}
    return {"perplexity": perplexity, "perplexity_se": 0.5, **nll, **more}


def side(perplexity, blocks, speed):
    return text_scores(
        perplexity,
        blocks=blocks,
        parameters=10**6 * (blocks + 2),
        bytes=2 * 10**6 * (blocks + 2),
        prefill_tokens_per_second=8 * speed,
        decode_tokens_per_second=speed,
    )


def hamiltonian(n, seed, unit="nats/token"):
    rng = np.random.default_rng(seed)
    coupling = np.triu(0.05 * rng.standard_normal((n, n)), 1)
    h = 0.2 + rng.random(n) + np.where(np.arange(n) == 0, 5.0, 0.0)
    error = 0.01 * (1 - np.eye(n))
    meta = {"energy": "pairwise", "loss": "KL(original || cut)", "samples": 4}
    meta["tokens"] = 40
    J = coupling + coupling.T
    return Hamiltonian(h, J, 0.0, unit, meta, np.full(n, 0.02), error)


def write_removal(place, energy, m, *, ranked=True):
    """Write `spectrum.json`, and all later files if ranked, for m blocks; return the choice."""
    n = energy.n
    rng = np.random.default_rng(m)

    def pick(blocks):
        return sorted(rng.choice(blocks, m, replace=False).tolist())

    # Random picks among the blocks of lowest h, a few more than m: low states without a solver.
    cheap = np.argsort(energy.h)[: m + 6]
    states = states_of(n, [pick(cheap) for _ in range(200)])
    spectrum = Spectrum.from_states(Problem(energy), states, 20, "exact")
    spectrum = replace(spectrum, proven=True, seconds=0.5)
    place.mkdir(exist_ok=True)
    spectrum.save(place / "spectrum.json")
    random = [pick(n) for _ in range(30)]

    def measured(removed):
        value = energy.energy(states_of(n, [removed])[0])
        kl = float(value * np.exp(0.1 * rng.standard_normal()))
        losses = {"kl": kl, "kl_se": 0.05 * kl, "nll": 3.0 + kl, "nll_se": 0.1}
        return {"removed": removed, "energy": value, **losses}

    if not ranked:
        return spectrum.removed(0)
    rows = [measured(spectrum.removed(k)) for k in range(len(spectrum))]
    best = min(range(len(rows)), key=lambda k: rows[k]["kl"])
    chosen = rows[best]["removed"]
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
    cut = {"removed": chosen, "of": n, "model": {}}
    write_json(place / "model/isingcut.json", "removal", cut)
    evaluation = {
        "samples": 5,
        "tokens": 555,
        "before": {**side(20.0, n, 40.0), "worst": 2.0, "worst_se": 0.5},
        "after": {**side(20.0 + 3 * m, n - m, 40.0 * n / (n - m)), "worst": 4.0},
        "metrics": {"worst": {"unit": "nats", "form": ".2f"}},
        "kl": 0.3 * m,
        "kl_se": 0.01,
        "answers": {"limit": 64, "pairs": [answers("Because.", "So ``` so.")]},
        "device": "cpu",
        "dtype": "float32",
    }
    write_json(place / "evaluation.json", "evaluation", evaluation)
    return chosen


def answers(before, after, prompt="Why?", **poor):
    fair = {"tokens": 9, "ended": True, "repeated": 0.0}
    both = {
        "before": {"text": before, **fair},
        "after": {"text": after, **fair, **poor},
    }
    return {"prompt": prompt, **both}


def baseline(name, removed, kl, **more):
    losses = {"kl": kl, "kl_se": 0.05, "nll": 3.5, "nll_se": 0.1}
    price = {"passes": 12.5, "heads": 0, "tokens_searched": 1000, "tokens_judged": 333}
    choice = {"baseline": name, "removed": removed, "violated": []}
    return {**choice, **losses, **price, **more}


def patch(**more):
    text = {"source": "-", "samples": 7, "searched": 4, "tokens": 700}
    text |= {"requested": 900, "short": ""}
    cut = {"removed": [3, 4], "block": 2, "layer": "mlp.down_proj"}
    proof = {"inputs": "text", "difference": 1e-7, "remarks": []}
    return {
        "cuts": [{**cut, "held_out_error_left": 0.4}],
        "changed": True,
        "unpatched": [],
        "text": text,
        "proof": proof,
        **more,
    }


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


def percent(value, low, high):
    return {"percent": value, "low": low, "high": high}


def flipped(row, lost, won, kept, kl):
    """Add flips to the row of a task, all in percent."""
    shares = {
        "changed": lost + won + 3.0,
        "right_to_wrong": lost,
        "wrong_to_right": won,
    }
    flips = {name: percent(v, 0.5 * v, 1.5 * v + 1) for name, v in shares.items()}
    return {**row, "flips": {**flips, "kept": kept, "choice_kl": kl}}


def run_content(model, energy, n, m, seed):
    """Return the content of `run.json` before its files are recorded."""
    options = {f: getattr(RunConfig(), f) for f in ("calibration", "keep", "budget")}
    own = {"model": model, "remove": str(m), "energy": energy, "seed": seed}
    solved = {
        f"remove-{k}/spectrum.json": _done("solve", 77.0, remove=str(k))
        for k in (m - 1, m + 2)
    }
    solved["calibration.safetensors"] = _done("calibration", 1.25)
    solved["spectrum.json"] = _done("solve", remove=str(m))
    cost = {"parameters": 10**6, "bytes": 2 * 10**6}
    blocks = [
        {"index": i, "kind": k, "kv_bytes_per_token": 512 * k.startswith("att"), **cost}
        for i, k in zip(range(n), itertools.cycle(KINDS))
    ]
    size = {f"total_{name}": (n + 2) * value for name, value in cost.items()}
    return {
        "config": {**own, **options},
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
):
    """Write a finished run of m of n blocks; ``extras`` adds all else that a report can show."""
    path.mkdir(parents=True)
    write_json(
        path / "run.json", "run", run_content(model, energy, n, m, seed), version=2
    )
    main = hamiltonian(n, 1)
    main.save(path / "hamiltonian.safetensors")
    chosen = write_removal(path, main, m)
    if extras:
        _write_extras(path, main, m, chosen)
    record(path)
    return path


def _write_extras(path, main, m, chosen):
    n = main.n
    other = hamiltonian(n, 2, "arbitrary")
    other.save(path / "hamiltonian.empirical-fisher.safetensors")
    write_removal(path / f"remove-{m - 1}", main, m - 1)
    write_removal(path / f"remove-{m + 2}", main, m + 2, ranked=False)
    removed = [b for b in range(n) if b not in chosen][:m]
    for name, kl, violated in (("sleb", 2.5, []), ("random", 9.0, ["keep 0"])):
        content = baseline(name, removed, kl, violated=violated)
        write_json(path / f"baseline-{name}.json", "baseline", content)
    steps = [{"step": k, "tokens": 512 * k, "loss": 1.0 / k} for k in range(1, 31)]
    (path / "healed").mkdir()
    write_json(path / "healed/healing.json", "healing", healing(steps, chosen, n))
    rows = [
        flipped(task("arc_easy", 0.62, 0.55), 12.0, 5.0, percent(81.1, 72, 91.5), 0.21),
        # No more answers are right or wrong than before, and half of them flipped.
        flipped(task("winogrande", 0.5, 0.5), 25.0, 25.0, None, 0.5),
        flipped(task("gsm8k", 0.04, 0.01), 3.0, 0.0, percent(25.0, 0, None), None),
        task("boolq", 0.6, 0.61),
    ]
    benchmarks = {"rows": rows, "engine": "lm_eval 0.4"}
    write_json(path / "benchmarks.json", "benchmarks", benchmarks)
