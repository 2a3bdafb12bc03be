"""What it takes to ask one model, or several candidates, the questions of a task.

    python benchmarks/asking.py [--questions 100] [--repeats 3]

Ours asks all candidates in one go, out of the original. The other side is lm-evaluation-harness
alone, as a user has it: its `HFLM` around the original and around a checkpoint of each candidate,
one after the other, `--batch` sequences at a time. Sides take turns; seconds are of processor time,
one thread, loading left out; medians. Candidates are the states of five methods of the quality
study.

Figures, of all tasks together:

asking_speedup_one    the harness's time over ours for the original alone
asking_speedup_five   the same for five candidates
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isingcut.evaluation.questions import Prepared, prepare_task, quiet
from isingcut.evaluation.scores import ScoredModel, score_states
from isingcut.measure.work import Work
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.load import load
from isingcut.models.sources import resolve

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FIVE = (
    (13, 14, 15, 16, 17, 18),
    (12, 13, 14, 17, 25, 26),
    (5, 14, 15, 16, 17, 18),
    (12, 13, 14, 15, 16, 17),
    (24, 25, 26, 27, 28, 29),
)


def loaded_by_the_harness(folder: Path, batch: int) -> Any:
    """A checkpoint as the harness has it."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(str(folder), dtype="bfloat16", device="cpu", batch_size=batch)


def by_the_harness(engines: list[Any], task: Prepared) -> list[float]:
    """Mean scores of checkpoints, each asked on its own."""
    from lm_eval.evaluator import evaluate

    found = []
    with quiet():
        for engine in engines:
            made = task.make()
            for each in made.values():
                each.set_config(key="num_fewshot", value=each.get_config("num_fewshot") or 0)
            tasks = {"tasks": made, "groups": {}, "group_map": {}}
            result: Any = evaluate(lm=engine, task_dict=tasks, bootstrap_iters=0)
            right = [
                s[(task.metric or "acc").partition(",")[0]]
                for t in made
                for s in result["samples"][t]
            ]
            found.append(sum(right) / len(right))
    return found


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=DATA)
    add("--tasks", nargs="*", default=["arc_easy", "mmlu_0shot", "hellaswag"])
    add("--questions", type=int, default=100)
    add("--batch", type=int, default=16, help="the harness's")
    add("--repeats", type=int, default=3)
    o = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(resolve("smollm2"), dtype="bfloat16", device="cpu")
    model, totals = ScoredModel.whole(loaded), dict[tuple[str, int], float]()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / "-".join(map(str, removed)) for removed in FIVE]
        for removed, folder in zip(FIVE, folders, strict=True):
            excise(loaded.folder, removed, folder)
        original = [loaded_by_the_harness(loaded.folder, o.batch)]
        five = [loaded_by_the_harness(folder, o.batch) for folder in folders]
        print(f"{'task':<14}{'models':>7}{'side':>9}{'seconds':>9}   scores in percent")
        for name in o.tasks:
            task = prepare_task(name, o.data, o.questions)
            for removed, engines in (([()], original), (FIVE, five)):
                sides: dict[str, Callable[[], list[float]]] = {
                    "ours": lambda r=removed, t=task: [
                        float(s.values.mean()) for s in score_states(model, t, r, Work())
                    ],
                    "harness": lambda e=engines, t=task: by_the_harness(e, t),
                }
                runs = [
                    {side: timed(call) for side, call in sides.items()} for _ in range(o.repeats)
                ]
                for side in sides:
                    seconds = statistics.median(run[side][0] for run in runs)
                    key = (side, len(engines))
                    totals[key] = totals.get(key, 0.0) + seconds
                    scores = " ".join(f"{100 * x:.0f}" for x in runs[0][side][1])
                    print(f"{name:<14}{len(engines):>7}{side:>9}{seconds:>9.1f}   {scores}")
    for words, count in (("one", 1), ("five", len(FIVE))):
        ratio = totals["harness", count] / totals["ours", count]
        print(f"asking_speedup_{words}: {ratio:.2f}")


if __name__ == "__main__":
    main()
