"""All pair measurements with prefix sharing against without, in one run.

    python benchmarks/pairs.py [--model smollm2] [--samples 1] [--length 256] [--repeats 3]
                               [--attention auto]

The N (N + 1) / 2 states are measured with shared prefixes. Every state needs the output head once,
shared prefixes or not: what time one state after the other takes, and what could at best be saved,
follow from the time of one head and of one block, which are measured beside. Ends with one line
`name: value` per figure.
"""

from __future__ import annotations

import statistics
import time
from itertools import combinations

import torch

from gradients import attention_of, options, prepare
from isingcut.data.tokens import TokenSet
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.replay import Replay, use_attention


def parts(replay: Replay, tokens: TokenSet, batch_tokens: int) -> tuple[float, float]:
    """Seconds of one block (mean over blocks) and of one head with its comparison, all tokens."""
    block = head = 0.0
    with torch.inference_mode(), use_attention(replay):
        output = OutputHead(replay)
        for batch in tokens.batches(batch_tokens):
            recording = replay.record(batch.input_ids)
            stream = recording.entered
            began = time.perf_counter()
            for i in range(len(replay)):
                stream = recording.block(i, stream)
            block += (time.perf_counter() - began) / len(replay)
            original = Comparison(output, recording, stream, batch)
            began = time.perf_counter()
            original.sum_samples([original.compare(stream)])
            head += time.perf_counter() - began
    return block, head


def main() -> None:
    parser = options(__doc__, samples=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    replay, tokens = prepare(arguments)
    n = len(replay)
    states = states_of(n, [*[(i,) for i in range(n)], *combinations(range(n), 2)])
    print(
        f"{arguments.model}, {n} blocks, {len(states)} states, {tokens.tokens} tokens, "
        f"{attention_of(replay)} attention, {torch.get_num_threads()} threads"
    )
    alone: list[tuple[float, float]] = []
    seconds = []
    for _ in range(arguments.repeats):
        alone += [parts(replay, tokens, arguments.batch_tokens) for _ in range(5)]
        began = time.perf_counter()
        found = measure(replay, tokens, states, Work(arguments.batch_tokens))
        seconds.append(time.perf_counter() - began)
    # Both sides also run the original once, for the reference.
    fraction = found.blocks_run / found.blocks_unshared
    block, head = (statistics.median(values) for values in zip(*alone, strict=True))
    heads, median = len(states) * head, statistics.median(seconds)
    ideal, most = (n * block + heads for n in (found.blocks_run, found.blocks_unshared))
    time_fraction = median / most
    print(f"\n{'side':<10}{'blocks run':>12}{'seconds':>10}")
    print(f"{'shared':<10}{found.blocks_run:>12}{median:>10.2f}")
    print(f"{'apart':<10}{found.blocks_unshared:>12}{most:>10.2f} (computed)")
    print(
        f"one block {1000 * block:.1f} ms, one output head with its comparison "
        f"{1000 * head:.1f} ms: {head / block:.1f} blocks"
    )
    print(f"\npairs_block_fraction: {fraction:.4f}")
    print(f"pairs_time_fraction: {time_fraction:.4f}")
    print(f"pairs_ideal_time_fraction: {ideal / most:.4f}")
    print(f"pairs_of_ideal_speedup: {ideal / most / time_fraction:.4f}")


if __name__ == "__main__":
    main()
