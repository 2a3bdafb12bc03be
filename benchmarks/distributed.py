"""Several processes against one, a killed process, and runs killed at random moments.

    python benchmarks/distributed.py [--model smollm2] [--samples 4] [--length 64] [--kills 10]

One process, two under `torchrun` and four under `accelerate launch` measure the same energies
and candidates; their Hamiltonians are compared bit by bit. Then one of two processes is killed
in the middle of the pair measurement. Then a chain of verbs, from `energy` to `excise`, is
killed with SIGKILL at random moments, typed again each time, and its files compared with those
of a chain that nobody killed. `--only identity,rank,kills` picks parts. Ends with one line
`name: value` per figure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from isingcut.files.writing import read_json
from isingcut.ising.hamiltonian import Hamiltonian


def launcher(processes: int) -> list[str]:
    """What starts `-m isingcut` in so many processes."""
    if processes == 1:
        return [sys.executable, "-m", "isingcut"]
    if processes == 4:
        # With --cpu it would start one process; this only says that there are several.
        flags = ["--multi_gpu", "--num_processes", "4", "--num_machines", "1"]
        flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *flags]
        return [*launch, "-m", "isingcut"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*launch, "-m", "isingcut"]


def verbs(a: argparse.Namespace, out: Path, energy: str = "pairwise") -> list[list[str]]:
    """A run up to the checkpoint, as one command per stage."""
    small = ["--samples", str(a.samples), "--length", str(a.length), "--rank-samples", "2"]
    small += ["--dtype", "float32", "--device", "cpu"]
    # Given, not timed: the choice of a timing may differ, and with it the last digits.
    small += ["--report-samples", "2", "--batch-tokens", str(a.length), "--attention", "sdpa"]
    return [
        ["energy", a.model, "--energy", energy, "--out", str(out), *small],
        ["solve", str(out), "--remove", str(a.remove), "--states", "6"],
        ["rank", str(out), "--remove", str(a.remove), "--random-states", "30"],
        ["excise", str(out), "--remove", str(a.remove)],
    ]


def run(command: list[str], processes: int = 1) -> float:
    """Seconds that a command took, one thread a process.

    Raises:
        SystemExit: it failed, or another number of processes took part.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    if processes > 1 and f"{processes} processes share the measuring" not in done.stderr:
        sys.exit(f"{' '.join(command)}\ndid not start {processes} processes")
    return time.perf_counter() - began


def difference(one: Path, other: Path) -> float:
    """Largest difference of two Hamiltonians' entries; 0 for the same file."""
    if one.read_bytes() == other.read_bytes():
        return 0.0
    a, b = Hamiltonian.load(one), Hamiltonian.load(other)
    return float(max(np.abs(a.h - b.h).max(), np.abs(a.J - b.J).max()))


def identity(a: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One, two and four processes on the same text."""
    print(f"\n{'processes':<11}{'pairwise, s':>12}{'difference':>12}  same candidates")
    figures: dict[str, float] = {}
    for count in (1, 2, 4):
        out, first = folder / f"processes-{count}", folder / "processes-1"
        energy, solve, rank, _ = verbs(a, out)
        seconds = run([*launcher(count), *energy], count)
        run([*launcher(1), *solve])
        run([*launcher(count), *rank], count)
        fisher = Path(f"{out}-fisher")
        run([*launcher(count), *verbs(a, fisher, "empirical-fisher")[0]], count)
        worst = max(
            difference(here / "hamiltonian.safetensors", there / "hamiltonian.safetensors")
            for here, there in ((first, out), (Path(f"{first}-fisher"), fisher))
        )
        found = [
            read_json(p / f"remove-{a.remove}" / "candidates.json", "candidates")
            for p in (first, out)
        ]
        same = found[0] == found[1]
        print(f"{count:<11}{seconds:>12.1f}{worst:>12.1e}  {same}", flush=True)
        if count > 1:
            figures[f"distributed_max_difference_{count}"] = worst
            figures[f"distributed_same_candidates_{count}"] = float(same)
    return figures


def rows(journal: Path) -> int:
    """How many rows a journal has so far."""
    if not journal.exists():
        return 0
    with contextlib.closing(sqlite3.connect(journal)) as database:
        return int(database.execute("SELECT count(*) FROM row").fetchone()[0])


def rank_killed(a: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Rank 1 of two is killed once both have kept a row."""
    out = folder / "rank-killed"
    energy = verbs(a, out)[0]
    run_of_two = subprocess.Popen(
        [*launcher(2), *energy],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    journals = [out / f"hamiltonian.safetensors.journal{end}" for end in ("", ".1")]
    while not all(map(rows, journals)):
        if run_of_two.poll() is not None:
            sys.exit("the run of two ended before it could be killed")
        time.sleep(0.01)
    workers = [
        p for p in psutil.Process(run_of_two.pid).children() if p.environ().get("RANK") == "1"
    ]
    workers[0].send_signal(signal.SIGKILL)
    began = time.perf_counter()
    said = run_of_two.communicate(timeout=120)[1]
    seconds = time.perf_counter() - began
    lines = [x for x in said.splitlines() if x.startswith("isingcut: ")]
    left = [p.name for p in out.iterdir() if p.name.startswith(".")]
    kept = sum(map(rows, journals))
    run([*launcher(1), *energy])
    first = folder / "processes-1"
    if not first.exists():
        run([*launcher(1), *verbs(a, first)[0]])
    same = difference(*(p / "hamiltonian.safetensors" for p in (first, out))) == 0.0
    print(f"\nrank 1 killed: all ended after {seconds:.1f} s, exit code {run_of_two.returncode}")
    print(f"said: {lines if len(lines) == 1 else said[-3000:]}")
    print(f"rows kept: {kept}; half-written files: {left}; one process went on to: same={same}")
    return {
        "distributed_kill_end_seconds": seconds,
        "distributed_kill_clean": float(len(lines) == 1 and not left and kept > 1 and same),
    }


def lasting(out: Path) -> dict[str, object]:
    """The content of every file that holds no times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name == "run.json":
            continue
        found[name] = path.read_bytes()
        if path.name == "spectrum.json":
            found[name] = {k: v for k, v in read_json(path, "spectrum").items() if k != "seconds"}
    return found


def kills(a: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Chains of verbs killed at random moments, until there were as many kills as wanted."""
    reference = folder / "whole"
    seconds = sum(run([*launcher(1), *verb]) for verb in verbs(a, reference))
    rng = random.Random(a.seed)
    done = chains = same = 0
    print(f"\na chain that nobody kills takes {seconds:.0f} s")
    while done < a.kills:
        out = folder / f"killed-{chains}"
        chains += 1
        for verb in verbs(a, out):
            while True:
                process = subprocess.Popen(
                    [*launcher(1), *verb],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                moment = rng.uniform(0, seconds) if done < a.kills else None
                try:
                    code = process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    done += 1
                    print(f"kill {done}: {verb[0]} after {moment:.1f} s", flush=True)
                    continue
                if code:
                    sys.exit(f"{' '.join(verb)} failed with {code}")
                break
        expected, found = lasting(reference), lasting(out)
        differ = sorted(k for k in expected | found if expected.get(k) != found.get(k))
        same += not differ
        print(f"chain {chains}: {len(found)} files, differing: {differ or 'none'}", flush=True)
        shutil.rmtree(out)
    return {"kill_resume_kills": done, "kill_resume_identical": float(same == chains)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--remove", type=int, default=6)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", default="identity,rank,kills")
    arguments = parser.parse_args()
    parts = {"identity": identity, "rank": rank_killed, "kills": kills}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="isingcut-distributed-") as folder:
        for name in arguments.only.split(","):
            figures |= parts[name](arguments, Path(folder))
    print()
    for name, value in figures.items():
        print(f"{name}: {value:g}")


if __name__ == "__main__":
    main()
