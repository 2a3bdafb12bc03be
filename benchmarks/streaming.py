"""Measure streaming: a 14 GB model in 4 GB of memory, and the cost for a model that fits.

    python benchmarks/streaming.py [--dir DIR] [--keep] [--only large|small]

Large: a 7B-shaped Llama with random weights is written to DIR (and removed afterwards, without
`--keep`). A separate process runs two jobs on it, `empirical-fisher` and 200 measured states; its
peak resident memory is the figure. Small: both jobs on SmolLM2 (24 states), streamed from the page
cache and in memory by turns. `projection.py` counts how often a search reads a model. Ends with one
line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.evaluation.speed import resident_peak
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.device import pick_dtype
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.sources import resolve
from isingcut.models.streaming.replay import StreamedReplay, open_model
from streaming_model import write_model

CPU = torch.device("cpu")


def random_states(n: int, count: int, removed: int) -> np.ndarray:
    """Return (count, n) states that remove ``removed`` blocks each."""
    keys = np.random.default_rng(0).random((count, n)).argsort(1).argsort(1)
    return keys < removed


# The large model ------------------------------------------------------------------------


def run_large(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both jobs on a streamed model; return their time, memory and reads."""
    dtype = pick_dtype("auto", CPU)
    model, store, memory = open_model(
        folder, dtype=dtype, device=CPU, memory_limit=arguments.memory_limit
    )
    seconds = {}
    # Drop the page cache that writing has filled, so that the files are read from disk.
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    replay = StreamedReplay(model, store, memory)
    seconds["reading once"] = time.perf_counter() - began
    rng = np.random.default_rng(0)
    tokens = TokenSet.from_rows(rng.integers(0, 32000, (2, 32)).tolist())
    work = Work(batch_tokens=64)
    began = time.perf_counter()
    EmpiricalFisher().measure(replay, tokens, work)
    seconds["empirical-fisher"] = time.perf_counter() - began
    states = random_states(len(replay), 200, len(replay) // 4)
    began = time.perf_counter()
    losses = measure(replay, tokens, states, work=work)
    seconds["states"] = time.perf_counter() - began
    assert np.isfinite(losses.kl).all()
    found = {"seconds": seconds, "peak": resident_peak(), "sweeps": store.count_sweeps()}
    return {**found, "blocks_run": losses.blocks_run, "dtype": dtype}


def large(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the model, run the jobs in a separate process, remove the model."""
    root = arguments.dir or Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(root).free) < 15e9:
        raise SystemExit(f"{root} has {free / 1e9:.1f} GB free, expected 15 GB: give another --dir")
    folder = Path(root) / "isingcut-streaming-7b"
    if not (folder / "config.json").is_file():
        folder.mkdir(exist_ok=True)
        write_model(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(run_large, folder, arguments).result()
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print(
        f"\n7B-shaped Llama: {size / 1e9:.2f} GB in bfloat16 on disk, {found['dtype']}, "
        f"2 samples of 32 tokens, {torch.get_num_threads()} threads, limit {arguments.memory_limit}"
    )
    for name, value in found["seconds"].items():
        print(f"{name:<20}{value:>9.1f} s")
    print(
        f"{found['blocks_run']} block evaluations for 200 states; "
        f"{found['sweeps'] * size / 1e9:.1f} GB read in all; peak {found['peak'] / 1e6:.0f} MB"
    )
    return found


# The small model ------------------------------------------------------------------------


def small() -> tuple[float, float]:
    """Run SmolLM2 both ways by turns; return the larger time ratio and the largest difference."""
    folder = resolve("smollm2")
    loaded = load(folder, device="cpu")
    text = build(
        "wiki", loaded.tokenizer, samples=16, rank_samples=2, report_samples=2, length=256, seed=0
    )
    tokens, whole, dtype = text.splits["energy"], Replay(loaded.model), loaded.dtype
    parts = StreamedReplay(*open_model(folder, dtype=dtype, device=CPU))
    states = random_states(len(whole), 24, 6)

    def losses(replay: Replay) -> np.ndarray:
        found = measure(replay, tokens.select(range(4)), states)
        return np.stack([found.kl_sums, found.nll_sums]) / found.counts

    jobs: dict[str, Callable[[Replay], np.ndarray]] = {
        "empirical-fisher": lambda replay: gate_gradients(replay, tokens),
        "24 states": losses,
    }
    print(f"\nSmolLM2, {dtype}, 1024 tokens at a time")
    print(f"{'job':<20}{'in memory, s':>14}{'streamed, s':>14}{'ratio':>8}{'difference':>12}")
    ratios, differences = [], []
    for name, job in jobs.items():
        seconds: list[tuple[float, float]] = []
        for repeat in range(6):
            times, results = {}, {}
            # Alternate the order, because the machine's other load grows or falls.
            for replay in (whole, parts) if repeat % 2 else (parts, whole):
                began = time.perf_counter()
                results[replay] = job(replay)
                times[replay] = time.perf_counter() - began
            if repeat:  # the first round warms up
                seconds.append((times[whole], times[parts]))
        medians = [statistics.median(side) for side in zip(*seconds, strict=True)]
        ratios.append(statistics.median(b / a for a, b in seconds))
        differences.append(float(np.abs(results[whole] - results[parts]).max()))
        print(
            f"{name:<20}{medians[0]:>14.2f}{medians[1]:>14.2f}{ratios[-1]:>8.3f}"
            f"{differences[-1]:>12.1e}"
        )
    return max(ratios), max(differences)


def main() -> None:
    """Run the requested parts and print the tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="where the large model is written (14 GB)")
    parser.add_argument("--keep", action="store_true", help="leave the large model there")
    parser.add_argument("--only", choices=("large", "small"))
    parser.add_argument("--memory-limit", default="4GB")
    arguments = parser.parse_args()
    figures: dict[str, str] = {}
    if arguments.only in (None, "large"):
        found = large(arguments)
        figures["stream_peak_mb"] = f"{found['peak'] / 1e6:.0f}"
    if arguments.only in (None, "small"):
        ratio, difference = small()
        figures["stream_time_ratio"] = f"{ratio:.3f}"
        figures["stream_max_difference"] = f"{difference:.1e}"
    print()
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
