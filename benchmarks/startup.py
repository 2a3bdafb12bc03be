"""How long a user waits before anything happens: `isingcut --help` and `import isingcut`.

    python benchmarks/startup.py [--rounds 15]

Every command is a whole process, started in turn with the others (A B C A B C ...), so that a
busy machine slows all of them alike; the figures are medians. Processor time beside the wall clock
says how much of it was waiting for others. `python -c pass` is what no
program can do without, `import torch` what a command would cost that loaded it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import isingcut": [sys.executable, "-c", "import isingcut"],
    "isingcut.prune": [sys.executable, "-c", "import isingcut; isingcut.prune"],
    "isingcut --help": [sys.executable, "-m", "isingcut.cli.main", "--help"],
    "isingcut solve --help": [sys.executable, "-m", "isingcut.cli.main", "solve", "--help"],
    "isingcut ls": [sys.executable, "-m", "isingcut.cli.main", "ls"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one process, which has to succeed."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():  # warm the file cache and the byte code
        seconds(command)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    head = f"{'command':<24}{'median, s':>10}{'least':>8}{'most':>8}{'processor':>11}"
    print(f"{head}   of {rounds} runs, in turn")
    medians = {}
    for name, values in taken.items():
        walls, used = zip(*values, strict=True)
        medians[name] = statistics.median(walls)
        figures = f"{medians[name]:>10.3f}{min(walls):>8.3f}{max(walls):>8.3f}"
        print(f"{name:<24}{figures}{statistics.median(used):>11.3f}")
    print(f"help_seconds: {medians['isingcut --help']:.3f}")
    print(f"import_seconds: {medians['import isingcut']:.3f}")


if __name__ == "__main__":
    main()
