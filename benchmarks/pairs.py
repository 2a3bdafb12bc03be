"""All pair measurements with prefix sharing against without, in one run.

    python benchmarks/pairs.py [--model smollm2] [--samples 1] [--length 256] [--repeats 3]

Both sides measure the same N (N + 1) / 2 states on the same tokens, interleaved. Ends with
one line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import combinations

import numpy as np

from gradients import prepare
from isingcut.energies.pairwise import indicator
from isingcut.measure import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    replay, tokens = prepare(arguments)
    n = len(replay)
    states = indicator(n, [*[(i,) for i in range(n)], *combinations(range(n), 2)])
    print(f"{arguments.model}, {n} blocks, {len(states)} states, {tokens.tokens} tokens")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    found = {}
    for _ in range(arguments.repeats):
        for shared in (True, False):
            began = time.perf_counter()
            found[shared] = measure(
                replay,
                tokens,
                states,
                batch_tokens=arguments.batch_tokens,
                share_prefixes=shared,
            )
            seconds[shared].append(time.perf_counter() - began)
    # Both sides also run the original once, for the reference.
    fraction = found[True].blocks_run / found[False].blocks_run
    time_fraction = statistics.median(
        a / b for a, b in zip(seconds[True], seconds[False], strict=True)
    )
    difference = np.abs(found[True].kl - found[False].kl).max()
    print(f"\n{'side':<10}{'blocks run':>12}{'seconds':>10}")
    for shared, name in ((True, "shared"), (False, "apart")):
        median = statistics.median(seconds[shared])
        print(f"{name:<10}{found[shared].blocks_run:>12}{median:>10.2f}")
    print(f"largest KL difference between the two: {difference:.1e} nats/token")
    print(f"\npairs_block_fraction: {fraction:.4f}")
    print(f"pairs_time_fraction: {time_fraction:.4f}")


if __name__ == "__main__":
    main()
