"""Cut a synthetic sharded bf16 checkpoint: peak memory, and speed against `cp` of the same files.

Both sides write to the same disk and are timed until `sync` returns, in turn, `--rounds` times;
the speed is bytes written per second. Run: python benchmarks/excise.py [--gb 14]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from streaming_model import Shape, write_model

LLAMA = Shape("Llama", 4096, 11008, 1, 32, 32, 64000)
CHILD = """
import json, resource, sys, time, os
from pathlib import Path
from isingcut.models.cutting.checkpoint import excise
start = time.perf_counter()
excise(Path(sys.argv[1]), json.loads(sys.argv[3]), Path(sys.argv[2]))
os.sync()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(p.stat().st_size for p in folder.iterdir())


def time_cp(source: Path, out: Path) -> float:
    """Seconds of `cp -r` and `sync`."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    os.sync()
    return time.perf_counter() - start


def time_excise(source: Path, out: Path, removed: list[int]) -> tuple[float, int]:
    """Seconds (imports left out) and peak bytes of a process that cuts and syncs."""
    os.sync()
    words = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(removed)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    report = json.loads(result.stdout.splitlines()[-1])
    return float(report["seconds"]), int(report["peak"])


def main() -> None:
    """Make the checkpoint, time both sides in turn, print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=14.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: temp")
    options = parser.parse_args()
    rest = LLAMA.bytes - 2 * LLAMA.block
    layers = max(2, round((options.gb * 1e9 - rest) / (2 * LLAMA.block)))
    shape = replace(LLAMA, layers=layers)
    removed = list(range(1, layers, 4))  # every fourth block
    rates: dict[str, list[float]] = {"cp": [], "excise": []}
    peak = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        write_model(source, shape)
        print(f"{shape.bytes / 1e9:.2f} GB, {layers} blocks, {len(removed)} removed")
        print(f"{'side':8} {'GB written':>10} {'seconds':>8} {'GB/s':>6} {'peak MB':>8}")
        for _ in range(options.rounds):
            for side in ("cp", "excise"):
                memory = 0
                if side == "cp":
                    seconds = time_cp(source, out)
                else:
                    seconds, memory = time_excise(source, out, removed)
                    peak = max(peak, memory)
                written = folder_bytes(out)
                rates[side].append(written / seconds)
                shown = f"{memory / 1e6:8.0f}" if memory else f"{'':8}"
                print(
                    f"{side:8} {written / 1e9:10.2f} {seconds:8.1f} "
                    f"{written / seconds / 1e9:6.2f} {shown}",
                    flush=True,
                )
                shutil.rmtree(out)
    speed = statistics.median(rates["excise"]) / statistics.median(rates["cp"])
    print(f"excise_peak_mb: {peak / 1e6:.1f}")
    print(f"excise_speed_over_cp: {speed:.3f}")


if __name__ == "__main__":
    main()
