"""Time gate gradients: a batched backward pass, one sample at a time, and a plain forward pass.

    python benchmarks/gradients.py [--model smollm2] [--samples 16] [--length 256] [--repeats 5]
                                   [--attention auto]

All three sides take turns on the same tokens with the same attention, and the medians are compared.
Peak memory of the batched and the forward side is measured in separate processes. Ends with one
line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.speed import resident_peak
from isingcut.measure.gates import run_gated
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.replay import Replay, use_attention
from isingcut.models.sources import resolve


def options(description: str | None, *, samples: int) -> argparse.ArgumentParser:
    """Return a parser with the options of the model, its text and the computation."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--calibration", default="wiki")
    add("--samples", type=int, default=samples)
    add("--length", type=int, default=256)
    add("--batch-tokens", type=int, default=1024)
    add("--dtype", default="auto", help="float32 shows both sides to be equal")
    add("--attention", default="auto", help="auto, sdpa or eager")
    return parser


def prepare(arguments: argparse.Namespace) -> tuple[Replay, TokenSet]:
    """Load the model and its text."""
    loaded = models.load(resolve(arguments.model), dtype=arguments.dtype, device="cpu")
    calibration = build(
        arguments.calibration,
        loaded.tokenizer,
        samples=arguments.samples,
        rank_samples=2,
        report_samples=2,
        length=arguments.length,
        seed=0,
    )
    replay = Replay(loaded.model)
    replay.attention = None if arguments.attention == "auto" else arguments.attention
    return replay, calibration.splits["energy"]


def forward(replay: Replay, tokens: TokenSet, batch_tokens: int) -> None:
    """Run the reference: a plain forward pass with the NLL, without gradients."""
    with torch.inference_mode(), use_attention(replay):
        for batch in tokens.batches(batch_tokens):
            logits = replay.model(input_ids=batch.input_ids, use_cache=False).logits
            for row, ids in zip(logits, batch.input_ids, strict=True):
                F.cross_entropy(row[:-1].float(), ids[1:])


def batch_one(replay: Replay, tokens: TokenSet) -> np.ndarray:
    """Return the gradients from one forward and one backward pass per sample."""
    with use_attention(replay):
        return np.array([_one(replay, tokens.select([s])) for s in range(tokens.samples)])


def _one(replay: Replay, single: TokenSet) -> np.ndarray:
    with torch.no_grad():
        recording = replay.record(single.input_ids)
    alphas = [torch.ones(1, requires_grad=True) for _ in range(len(replay))]
    stream = recording.entered
    for i, alpha in enumerate(alphas):
        stream = run_gated(recording, i, stream, alpha, "sublayer", ones=True)
    logits = recording.logits(stream[0], 0)
    loss = F.cross_entropy(logits[:-1].float(), single.input_ids[0, 1:])
    return torch.cat(torch.autograd.grad(loss, alphas)).double().numpy()


def peak_of(side: str, arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Run a side; return peak MB, MB above the loaded model, and number of parameter gradients."""
    replay, tokens = prepare(arguments)
    # Linux: reset the high-water mark, which would otherwise include the peak of loading.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak() / 1e6
    if side == "batched":
        gate_gradients(replay, tokens, work=Work(arguments.batch_tokens))
    else:
        forward(replay, tokens, arguments.batch_tokens)
    peak = resident_peak() / 1e6
    return peak, peak - before, sum(p.grad is not None for p in replay.model.parameters())


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process and return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = options(__doc__, samples=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    replay, tokens = prepare(arguments)
    # The processes that measure memory use the same attention.
    arguments.attention = replay.attention or replay.model.config._attn_implementation
    print(
        f"{arguments.model}, {len(replay)} blocks, {tokens.samples} samples, "
        f"{tokens.tokens} tokens, "
        f"{next(replay.model.parameters()).dtype}, {arguments.attention} attention, "
        f"{torch.get_num_threads()} threads"
    )
    rows: dict[str, np.ndarray] = {}
    sides: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(replay, tokens, arguments.batch_tokens),
        "batched": lambda: rows.update(
            batched=gate_gradients(replay, tokens, work=Work(arguments.batch_tokens))
        ),
        "batch 1": lambda: rows.update(one=batch_one(replay, tokens)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)

    def ratio(name: str, base: str) -> float:
        pairs = zip(seconds[name], seconds[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    difference = np.abs(rows["batched"] - rows["one"]).max() / np.abs(rows["one"]).max()
    print(f"\n{'side':<10}{'ms/token':>10}{'ratio to forward':>18}")
    for name in sides:
        each = 1000 * statistics.median(seconds[name]) / tokens.tokens
        print(f"{name:<10}{each:>10.3f}{ratio(name, 'forward'):>18.2f}")
    # In bfloat16 the difference is the rounding of thirty blocks; in float32 the sides agree.
    print(f"largest difference between the two gradient matrices: {difference:.1e} of the largest")
    peak, added, held = in_process(peak_of, "batched", arguments)
    base, base_added, _ = in_process(peak_of, "forward", arguments)
    print(
        f"peak memory: batched {peak:.0f} MB ({added:.0f} MB above the loaded model), "
        f"forward {base:.0f} MB ({base_added:.0f} MB above); parameter gradients held: {held}"
    )
    print(f"\ngradients_forward_ratio: {ratio('batched', 'forward'):.3f}")
    print(f"gradients_batch1_speedup: {ratio('batch 1', 'batched'):.3f}")
    print(f"gradients_peak_mb: {peak:.0f}")


if __name__ == "__main__":
    main()
