"""Which blocks each method chooses, what the choice costs, and what is left of the model.

    python benchmarks/quality.py --plan                # what is left to do, in minutes
    python benchmarks/quality.py [--minutes 100]       # do it, in the order of importance
    python benchmarks/quality.py --collect             # finished parts -> results/quality.json
    python benchmarks/quality.py --summary             # its tables and figures

The work is cut into parts, one file each in the folder `--work`; a finished part is never done
again, one that was interrupted goes on from its journal, and `--only PREFIX` (may be repeated)
runs the parts whose names begin so, in a second process if wanted. `--minutes` bounds one call:
no part is started that is expected to end later.

    python benchmarks/quality.py --model DIR --calibration FILE --judge FILE --remove 4

compares all methods on any other model and text, judges, collects and prints. The committed
results/quality.json was made with `--pool 8`. The parts it was collected from are not kept: they
are made again by a run with that option.

Every method chooses on the same `--pool` samples and pays in the same unit: full forward passes
(block evaluations over the number of blocks) and output heads over the whole pool, shared
prefixes credited to all. The two methods that measure most states on parts of their text,
`evopress` and `refined`, draw these from `--search-pool` samples, the pool's among them. What
they pay is counted in passes over the pool too: the budget buys them fewer but wider looks.
They get at most the passes that SLEB, as published, took to the same number of removals;
`refined-joint` searches for all numbers at once with SLEB's passes for the largest. KL is to
the original model, in nats per token.

Figures, from the table of the first text that blocks are chosen on:

refined_kl_over_best_baseline_M  KL of `refined` over the lowest KL of all other methods (the
    pair energy and our variants of published methods included, `refined-joint` not), pooled over
    all tokens of the judged texts. A method with several seeds stands for its median run.
refined_mean_rank  rank of `refined` by KL among the same methods (1: lowest; equal states share
    their ranks), mean over the numbers of removals and the judged texts.
refined_lowest_or_within  share of the combinations of a number of removals, a judged text and a
    measure (KL, perplexity) in which `refined` is the lowest of these methods, or the 95 %
    interval of its difference from the lowest other one reaches zero (paired bootstrap over
    samples, 2,000 resamples).
refined_mean_kl_over_best_baseline  the mean over the numbers of removals of the pooled KL of
    `refined`, over the lowest such mean of another method.
refined_evaluations_over_sleb  passes of `refined` over those of SLEB for the same number of
    removals, the largest over numbers and seeds; refined_heads_over_sleb, the same for heads.
spearman_pairwise_M, spearman_empirical_fisher_2048_M  Spearman of the energy with the measured
    KL on unseen instruction conversations, over its 20 lowest states and 40 random ones; the
    pair energy measured on conversations too (as many tokens as the pool), the paper's on 2,048.
refined_tokens_over_evopress  tokens times passes at which a `refined` search on the large pool
    first reached the final judged KL of the long evolution, over what the evolution spent
    (printed once both were run, and only if it was reached).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from _parts_command import add_working, parser_of
from _quality_bench import REPOSITORY, Bench
from _quality_collect import KIND, accuracy_states, collect
from _quality_estimators import estimator_parts
from _quality_evolution import large_parts
from _quality_judge import expected, judging
from _quality_methods import Choosing
from _quality_store import Part, Price, Stage, drive, show_plan
from _quality_summary import show
from _quality_tasks import TASKS, accuracy_expected, accuracy_parts
from isingcut.errors import IsingcutError
from isingcut.files.writing import read_json

RESULTS = REPOSITORY / "benchmarks" / "results" / "quality.json"


def numbers(text: str) -> list[int]:
    """``3,6,9`` as a list."""
    return [int(item) for item in text.split(",") if item]


def parser() -> argparse.ArgumentParser:
    found = parser_of(__doc__)
    add = found.add_argument
    add("--model", default="smollm2")
    add("--calibration", default="wiki", help="text to choose on")
    add("--judge", action="append", help="text to judge on instead of the three standard ones")
    add("--remove", type=numbers, default=[3, 6, 9, 12, 15], help="numbers of blocks to remove")
    add("--second-remove", type=numbers, default=[6, 12], help="the same on instructions")
    add("--accuracy-remove", type=numbers, default=[6, 9])
    add("--estimator-remove", type=numbers, default=[4, 8, 12])
    add("--estimator-sizes", type=numbers, default=[256, 1024, 2048], help="conversations")
    add("--estimator-tokens", type=int, default=2048, help="conversation tokens to judge it on")
    add("--lowest", type=int, default=20, help="lowest states of an energy in its study")
    add("--random-states", type=int, default=40, help="random states in that study")
    add("--pool", type=int, default=8, help="samples to choose on")
    add("--search-pool", type=int, default=16, help="samples for evopress and refined, see above")
    add("--length", type=int, default=256, help="tokens a sample")
    add("--chat-length", type=int, default=512, help="most tokens of a conversation")
    add("--judged-tokens", type=int, default=8192, help="tokens of each text to judge on")
    add("--seeds", type=int, default=3, help="runs of methods that are random")
    add("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    add("--questions", type=int, default=500, help="questions of each task")
    add("--large-pool", type=int, default=128, help="samples for the long evolution")
    add("--large-remove", type=int, default=9)
    add("--large-minutes", type=float, default=0.0, help="length of the long evolution (0: none)")
    add("--large-share", type=float, default=0.1, help="its tokens that `refined` may spend there")
    words = "default: the committed one, or with --judge one in the work folder"
    add_working(found, "quality", words)
    found.set_defaults(minutes=100.0)
    add("--batch-tokens", type=int, default=1024)
    add("--dtype", default="auto")
    return found


def plan(bench: Bench) -> list[Stage]:
    """All stages, the most important first: a time limit cuts at the end."""
    o = bench.options
    first = Choosing(bench, bench.chosen_on[0], o.remove)
    stages: list[Stage] = []

    def choose(title: str, *groups: list[Part]) -> None:
        parts = [part for group in groups for part in group]
        stages.append(Stage(title, lambda: parts))

    def judge(title: str) -> None:
        # What is chosen since the judging before this one.
        since = stages[_last_judging(stages) :]

        def waiting() -> list[Price]:
            left = [p for s in since for p in s.parts() if not bench.store.done(p.name)]
            return expected(bench, 2 * sum(p.name.startswith("choose/") for p in left))

        stages.append(Stage(title, lambda: judging(bench), waiting))

    where = bench.chosen_on[0]
    choose(f"choose on {where}, no seed", first.fixed())
    choose(f"choose on {where}, seed 0", first.seeded(0), [first.joint(0)])
    judge("judge")
    if not bench.own_text:
        second = Choosing(bench, "instruct", o.second_remove, short=True)
        choose("choose on instructions, no seed", second.fixed())
        pairs = {"pairwise": second, "pairwise-wiki": first}
        study = estimator_parts(bench, o.estimator_remove, o.estimator_sizes, pairs)
        stages.append(Stage("the paper's estimator", lambda: study))
        choose("choose on instructions, seed 0", second.seeded(0))
        judge("judge again")
        stages.append(
            Stage(
                "accuracy",
                lambda: accuracy_parts(bench, accuracy_states(bench)),
                lambda: accuracy_expected(bench, len(accuracy_states(bench))),
            )
        )
    later = range(1, o.seeds)
    choose(f"choose on {where}, other seeds", [first.joint(s) for s in later])
    choose(f"choose on {where}, other seeds", *(first.seeded(s) for s in later))
    if not bench.own_text:
        choose("choose on instructions, other seeds", *(second.seeded(s) for s in later))
    if o.large_minutes:
        long = large_parts(first, o.large_remove, o.large_minutes, o.large_share)
        stages.append(Stage("the long evolution", lambda: long))
    judge("judge the rest")
    return stages


def _last_judging(stages: list[Stage]) -> int:
    return max((i + 1 for i, s in enumerate(stages) if s.title.startswith("judge")), default=0)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.results is None:
        options.results = Path(options.work) / "quality.json" if options.judge else RESULTS
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.summary and not options.collect:
            show(read_json(Path(options.results), KIND))
            return
        bench = Bench(options)
        if not options.collect:
            _note_command(options, sys.argv[1:] if arguments is None else arguments)
            stages = plan(bench)
            planned = show_plan(stages, bench.store, bench.speed, parts=options.plan)
            if options.plan:
                return
            drive(
                stages,
                bench.store,
                bench.speed,
                only=options.only,
                minutes=options.minutes,
                planned=planned,
            )
        if options.collect or bench.own_text:
            content = collect(bench, Path(options.results))
            show(content)
    except IsingcutError as error:
        raise SystemExit(f"error: {error}") from None


def _note_command(options: argparse.Namespace, arguments: list[str]) -> None:
    """Keep what was typed, for the provenance; folders of absolute paths are left out."""
    words = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    line = " ".join(["quality.py", *words])
    path = Path(options.work) / "commands.txt"
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line not in before and not options.plan:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*before, line]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
