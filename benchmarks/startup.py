"""How long a user waits before anything happens: `isingcut --help` and `import isingcut`.

    python benchmarks/startup.py [--rounds 15]

Every command is a whole process, started in turn with the others (A B C A B C ...), so that a
busy machine slows all of them alike; the figures are medians. `python -c pass` is what no program
can do without, `import torch` what a command would cost that loaded it.
"""

from __future__ import annotations

import argparse
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


def seconds(command: list[str]) -> float:
    """Seconds of one process, which has to succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():  # warm the file cache and the byte code
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    print(f"{'command':<24}{'median, s':>10}{'least':>8}{'most':>8}   of {rounds} runs, in turn")
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, values in taken.items():
        print(f"{name:<24}{medians[name]:>10.3f}{min(values):>8.3f}{max(values):>8.3f}")
    print(f"help_seconds: {medians['isingcut --help']:.3f}")
    print(f"import_seconds: {medians['import isingcut']:.3f}")


if __name__ == "__main__":
    main()
