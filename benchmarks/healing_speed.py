"""What a token of healing costs: our training loop against a plain one, trl's and bare passes.

    python benchmarks/healing_speed.py [--model smollm2] [--remove 13-18] [--text packed chat]
    python benchmarks/healing_speed.py --tiny         # a tiny random model: seconds, no figures
                                                      # to quote

All sides train the same cut model in float32 weights on the same samples with the same steps:

ours    `isingcut heal`'s training, from its first step to its last, without what surrounds it
last    the same with `--method last:3`
plain   a loop as one writes it: teacher, student, KL, backward, AdamW
gkd     trl's GKDTrainer on the text as it is (lmbda 0, beta 0: the same loss), where trl is there
sft     trl's SFTTrainer: the student alone learns the text

and bare passes, without loss, optimiser or padding: the teacher's logits (`teacher`), the
student's logits and the backward pass of a fixed gradient (`student`), both in the dtype that is
computed in and with the attention that our training takes. Where one thread computes on a CPU,
seconds are of processor time, so that other work on the machine does not count.

Sides take turns; medians count, without each turn's warm-up: the first bare pass, and two steps of
a training, because AdamW's moments come at the end of the first and the second's activations take
new memory, once. trl is left out where it is not installed: `pip install trl` into an environment
that sees isingcut. Samples of the text `packed` are full, those of `chat` conversations of unequal
length. Ends with one line `name: value` per figure; those of `chat` say so:

healing_cost_over_ideal     our seconds per token over those of teacher and student bare
healing_speedup_over_trl    the GKDTrainer's seconds per token over ours
healing_speedup_over_sft    the SFTTrainer's, which runs no teacher
healing_speedup_over_plain  those of the plain loop
healing_last_over_full      those of the last three blocks over those of all
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

from healing_sides import SIDES, WARM_UP, Bench

RATIOS = {
    "healing_cost_over_ideal": ("ours", "both"),
    "healing_last_over_full": ("last", "ours"),
    "healing_speedup_over_trl": ("gkd", "ours"),
    "healing_speedup_over_sft": ("sft", "ours"),
    "healing_speedup_over_plain": ("plain", "ours"),
}
REPOSITORY = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--model", default="smollm2")
    add("--remove", default="13-18", help="blocks the student lacks")
    add("--tiny", action="store_true", help="a tiny random model instead")
    add("--text", nargs="+", default=["packed"], choices=["packed", "chat"])
    add("--chat", default=str(REPOSITORY.parent / "shared/data/calib_instruct/mix1000.jsonl"))
    add("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    add("--length", type=int, default=256)
    add("--batch", type=int, default=8)
    add(
        "--micro-batch", type=int, default=None, help="default: as healing chooses; trl gets it too"
    )
    add("--steps", type=int, default=4, help=f"of a turn; the first {WARM_UP} are a warm-up")
    add("--repeats", type=int, default=3)
    add("--dtype", default="auto")
    return found


def measure(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds per real token of every step but the turns' warm-up, by side."""
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats):
        for name, side in bench.sides().items():
            began = time.perf_counter()
            seconds.setdefault(name, []).extend(side())
            taken = time.perf_counter() - began
            give_back_memory()
            print(f"turn {turn + 1}/{repeats}: {name} {taken:.1f} s", flush=True)
    return seconds


def give_back_memory() -> None:
    """What a side leaves behind, to the system: freed buffers are kept otherwise."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def show(text: str, seconds: dict[str, list[float]]) -> None:
    """A table of one text."""
    print(f"{text:<10}{'tokens/s':>10}{'ms/token':>10}{'least':>9}{'most':>9}")
    for name, found in seconds.items():
        ms = 1000 * statistics.median(found)
        print(f"{name:<10}{1000 / ms:>10.1f}{ms:>10.3f}", end="")
        print(f"{1000 * min(found):>9.3f}{1000 * max(found):>9.3f}")


def figures(text: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """The ratios of the medians, of sides that were run."""
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    if {"teacher", "student"} <= middle.keys():
        middle["both"] = middle["teacher"] + middle["student"]
    end = "" if text == "packed" else f"_{text}"
    return {
        name + end: middle[above] / middle[below]
        for name, (above, below) in RATIOS.items()
        if {above, below} <= middle.keys()
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.steps <= WARM_UP:
        parser().error(f"--steps must be {WARM_UP + 1} or more, the first {WARM_UP} are a warm-up")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        print(bench.described(), flush=True)
        found: dict[str, float] = {}
        for text in options.text:
            bench.take(text)
            seconds = measure(bench, options.repeats)
            show(text, seconds)
            found |= figures(text, seconds)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
