"""Cut a synthetic sharded bf16 checkpoint: peak memory, and speed against `cp` of the same files.

Both sides write to the same disk and are timed until `sync` returns, in turn, `--rounds` times;
the speed is bytes written per second. Run: python benchmarks/excise.py [--blocks 32]
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
from pathlib import Path

from streaming_model import write_model

CHILD = """
import json, os, re, sys, time
from pathlib import Path
from isingcut.models.cutting.checkpoint import excise
start = time.perf_counter()
excise(Path(sys.argv[1]), json.loads(sys.argv[3]), Path(sys.argv[2]))
os.sync()
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([seconds, 1024 * int(peak)]))
"""


def time_cp(source: Path, out: Path, removed: list[int]) -> tuple[float, int]:
    """Return the seconds of `cp -r` and `sync`; its memory is not measured."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    os.sync()
    return time.perf_counter() - start, 0


def time_excise(source: Path, out: Path, removed: list[int]) -> tuple[float, int]:
    """Return seconds (without imports) and peak bytes of a process that cuts and syncs."""
    words = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(removed)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    return seconds, peak


def main() -> None:
    """Make the checkpoint, time both sides in turn, print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32, help="of 0.4 GB, and 1 GB besides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: temp")
    options = parser.parse_args()
    removed = list(range(1, options.blocks, 4))  # every fourth block
    rates: dict[str, list[float]] = {"cp": [], "excise": []}
    peak = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        size = write_model(source, options.blocks, 64000)
        print(f"{size / 1e9:.2f} GB, {options.blocks} blocks, {len(removed)} removed")
        print(f"{'side':8} {'GB written':>10} {'seconds':>8} {'GB/s':>6} {'peak MB':>8}")
        for _ in range(options.rounds):
            for side, measured in (("cp", time_cp), ("excise", time_excise)):
                os.sync()
                seconds, memory = measured(source, out, removed)
                peak = max(peak, memory)
                written = sum(p.stat().st_size for p in out.iterdir()) / 1e9
                rates[side].append(written / seconds)
                cells = f"{written:10.2f} {seconds:8.1f} {rates[side][-1]:6.2f} {memory / 1e6:8.0f}"
                print(f"{side:8} {cells}", flush=True)
                shutil.rmtree(out)
    speed = statistics.median(rates["excise"]) / statistics.median(rates["cp"])
    print(f"excise_peak_mb: {peak / 1e6:.1f}")
    print(f"excise_speed_over_cp: {speed:.3f}")


if __name__ == "__main__":
    main()
