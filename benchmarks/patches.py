"""What a patch wins back: fitted by least squares alone, and tuned on the loss after it.

    python benchmarks/patches.py                      # M = 6, 9, 12: 20 minutes of one core
    python benchmarks/patches.py --summary            # the table and the figures

The states are those that `benchmarks/healing.py` found for us (`results/healing.json`), the text
that is fitted on is its too: conversations and Wikipedia leads. Each state is judged on text that
nothing was chosen, fitted or tuned on, in memory: blocks skipped, layers replaced. Each M is kept
in the result file when it is finished, and is not computed again with the same settings.

linear_percent_M  share of the lost log-perplexity that the least-squares patch wins back, pooled
tuned_percent_M  the same after tuning
tuned_kl_over_linear_M  KL to the original, pooled over all tokens of the texts
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _healing_parts import OURS
from _healing_summary import RESULTS
from _healing_texts import Remembered, judged_texts, training_text
from isingcut.console.progress import terminal
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.quality import sample_sums
from isingcut.files import documents
from isingcut.files.provenance import versions
from isingcut.files.writing import read_json, write_json
from isingcut.healing.healers.linear_patch import LinearPatch
from isingcut.healing.patch.files import Patch, applied
from isingcut.healing.training.tune import parted, tune
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, skipped, stack_modules
from isingcut.models.load import load
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.models.sources import resolve

HERE = Path(__file__).resolve().parent
KIND = "patch-benchmark"
documents.KINDS[KIND] = documents.Strict
STAGES = ("cut", "linear", "tuned")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--model", default="smollm2")
    add("--remove", type=lambda t: [int(m) for m in t.split(",")], default=[6, 9, 12])
    add("--states", type=Path, default=HERE / "results" / "healing.json")
    add("--patch-tokens", type=int, default=16384)
    add("--judged-tokens", type=int, default=4096, help="of each text")
    add("--batch-tokens", type=int, default=1024)
    add("--dtype", default="bfloat16")
    add("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    add("--out", type=Path, default=HERE / "results" / "patches.json")
    add("--summary", action="store_true")
    return found


def judged(
    original: Any, asked: Any, texts: dict[str, TokenSet], removed: list[int], patches: list[Patch]
) -> dict[str, Any]:
    """Of each text, by sample: summed losses of the original and the state, KL, predictions."""
    stack = find_stack(original)

    class State:
        device = original.device

        def __call__(self, **given: Any) -> Any:
            blocks = stack_modules(original, stack)
            with skipped(original, stack, removed), applied(blocks, patches):
                return original(**given)

    found = {}
    for name, tokens in texts.items():
        sums = np.asarray(sample_sums(asked, State(), tokens, 1024))
        found[name] = {
            "sums": sums.round(4).tolist(),
            "tokens": tokens.predicted.sum(1).tolist(),
        }
    return found


def measure(options: argparse.Namespace, missing: list[int], found: dict[str, Any]) -> None:
    """Fit, tune and judge the states of the numbers that are missing; each is kept at once."""
    reuse_freed_memory()
    loaded = load(resolve(options.model), dtype=options.dtype)
    model, stack = loaded.model, find_stack(loaded.model)
    replay = Replay(model, stack_modules(model, stack))
    with tempfile.TemporaryDirectory() as place:
        text = training_text(
            options.data,
            loaded.tokenizer,
            Path(place) / "train.jsonl",
            samples=options.patch_tokens // 256,
            length=256,
            seed=0,
        ).train
    texts = judged_texts(options.data, loaded.tokenizer, options.judged_tokens)
    asked, work = Remembered(model), Work(options.batch_tokens, terminal)
    for m in missing:
        removed = states(options.states)[m]
        rows: dict[str, Any] = {"cut": judged(model, asked, texts, removed, [])}
        began = time.process_time()
        fitted = LinearPatch().fit(replay, stack.kinds, text, removed, work)
        fit = time.process_time() - began
        rows["linear"] = judged(model, asked, texts, removed, fitted.patches)
        began = time.process_time()
        rest, held_out = parted(text)
        start = LinearPatch().fit(replay, stack.kinds, rest, removed, work).patches
        tuned = tune(replay, rest, held_out, removed, start, work)
        seconds = {"fit": round(fit, 1), "tune": round(time.process_time() - began, 1)}
        rows["tuned"] = judged(model, asked, texts, removed, tuned.patches)
        found["rows"][str(m)] = {
            "removed": removed,
            "stages": rows,
            "tuning": tuned.record,
            "processor_seconds": seconds,
        }
        write_json(options.out, KIND, found)


def states(path: Path) -> dict[int, list[int]]:
    """Our state of each number of blocks, of the healing benchmark's results."""
    removals = read_json(path, RESULTS)["removals"]
    return {int(m): rows[OURS]["removed"] for m, rows in removals.items()}


def summary(found: dict[str, Any]) -> None:
    """The table and the figures."""
    print(f"{'':12} {'M':>3}  perplexity      KL  recovered  (KL by text, minus linear's ± se)")
    for m, row in sorted(found["rows"].items(), key=lambda pair: int(pair[0])):
        stages = {name: Judged(row["stages"][name]) for name in STAGES}
        for name, one in stages.items():
            share = one.recovered(stages["cut"])
            by = ", ".join(
                f"{text} {one.kl_of(text):.4f}"
                + (f" ({d:+.4f} ± {se:.4f})" if name == "tuned" else "")
                for text in one.texts
                for d, se in [one.minus(stages["linear"], text)]
            )
            print(f"{name:12} {m:>3} {one.perplexity:11.3f} {one.kl:7.4f} {share:9.1%}  {by}")
        print(f"linear_percent_{m}: {100 * stages['linear'].recovered(stages['cut']):.4g}")
        print(f"tuned_percent_{m}: {100 * stages['tuned'].recovered(stages['cut']):.4g}")
        print(f"tuned_kl_over_linear_{m}: {stages['tuned'].kl / stages['linear'].kl:.4g}")


class Judged:
    """A state at one stage on all texts."""

    def __init__(self, texts: dict[str, Any]) -> None:
        self.texts = {name: np.asarray(t["sums"]) for name, t in texts.items()}
        self.tokens = {name: np.asarray(t["tokens"], float) for name, t in texts.items()}
        before, after, kl = np.concatenate(list(self.texts.values()), axis=1)
        count = sum(t.sum() for t in self.tokens.values())
        self.lost = float(after.sum() - before.sum()) / count
        self.perplexity = float(np.exp(after.sum() / count))
        self.kl = float(kl.sum()) / count

    def kl_of(self, text: str) -> float:
        return float(self.texts[text][2].sum() / self.tokens[text].sum())

    def recovered(self, cut: Judged) -> float:
        return 1 - self.lost / cut.lost

    def minus(self, other: Judged, text: str) -> tuple[float, float]:
        """Difference of KL a token and its standard error, paired over samples."""
        difference, tokens = self.texts[text][2] - other.texts[text][2], self.tokens[text]
        mean, n = difference.sum() / tokens.sum(), len(tokens)
        spread = np.sqrt(np.square(difference - mean * tokens).sum() * n / (n - 1))
        return float(mean), float(spread / tokens.sum())


def main() -> None:
    options = parser().parse_args()
    names = ("model", "patch_tokens", "judged_tokens", "dtype")
    settings = {name: getattr(options, name) for name in names}
    found: dict[str, Any] = {"settings": settings, "rows": {}, "provenance": versions()}
    if options.out.exists():
        kept = read_json(options.out, KIND)
        if options.summary or kept["settings"] == settings:
            found = {k: v for k, v in kept.items() if k not in ("format", "version")}
    missing = [m for m in options.remove if str(m) not in found["rows"]]
    if not options.summary and missing:
        torch.set_num_threads(1)
        measure(options, missing, found)
    summary(found)


if __name__ == "__main__":
    main()
