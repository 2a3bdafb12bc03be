"""Time healing per token: our training loop against a plain one, trl's and bare passes.

    python benchmarks/healing_speed.py [--model smollm2] [--remove 13-18]
    python benchmarks/healing_speed.py --tiny         # a tiny random model: seconds, no figures
                                                      # to quote

All sides train the same cut model, with float32 weights, on the same samples with the same steps:

ours    the training of `isingcut heal` from its first step to its last, without the work around it
plain   a hand-written loop: teacher, student, KL, backward, AdamW
gkd     trl's GKDTrainer on the same text (lmbda 0, beta 0: the same loss), if trl is installed
sft     trl's SFTTrainer: the student alone is trained on the text

and bare passes, without loss, optimiser or padding: the teacher's logits (`teacher`), and the
student's logits with the backward pass of a fixed gradient (`student`), both in the dtype and with
the attention of our training. If one thread computes on a CPU, seconds are of processor time, so
that other work on the machine does not count.

Sides take turns, and medians are compared. Each turn's warm-up is left out: the first bare pass,
and two steps of a training, because AdamW allocates its moments at the end of the first step and
the second's activations take new memory, once. Without trl its sides are left out: `pip install
trl` into an environment that has isingcut. Ends with one line `name: value` per figure:

healing_cost_over_ideal     our seconds per token over the sum of bare teacher and bare student
healing_speedup_over_trl    the GKDTrainer's seconds per token over ours
healing_speedup_over_sft    the SFTTrainer's over ours; it runs no teacher
healing_speedup_over_plain  the plain loop's over ours
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from isingcut.data import healing_text
from isingcut.data.calibration import TextSampler
from isingcut.data.tokens import TokenSet
from isingcut.formats.cutting.checkpoint import excise
from isingcut.formats.sources import resolve
from isingcut.healing.job import Job
from isingcut.healing.training.train import train
from isingcut.models.device import BatchLimit
from isingcut.models.load import load
from isingcut.models.verify import reload
from isingcut.options.heal import HealConfig
from isingcut.options.parsed import BlockList
from isingcut.testing.tiny import tiny_checkpoint

SIDES = ("teacher", "student", "ours", "plain", "gkd", "sft")
WARM_UP = 2
"""First steps of a training, which are not counted."""
RATIOS = {
    "healing_cost_over_ideal": ("ours", "both"),
    "healing_speedup_over_trl": ("gkd", "ours"),
    "healing_speedup_over_sft": ("sft", "ours"),
    "healing_speedup_over_plain": ("plain", "ours"),
}


def now() -> float:
    """Return seconds; processor time if one thread computes on a CPU, to exclude other work."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


class Bench:
    """Original model, cut model and text of all sides, with a method to time each side.

    Args:
        options: parsed command line.
        folder: folder for checkpoints and unfinished trainings.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        source = (
            tiny_checkpoint("llama", folder / "tiny") if options.tiny else options.model
        )
        self.original = load(resolve(str(source)), dtype=options.dtype)
        removed = BlockList("2,3" if options.tiny else options.remove)
        self.removed = self.original.stack.remove(removed.numbers)
        self.cut = folder / "cut"
        excise(self.original.folder, self.removed, self.cut)
        self.tokens = healing_text.build(
            "wiki",
            TextSampler(self.original.tokenizer, options.length, 0),
            samples=options.batch * options.steps,
            report_samples=1,
        ).train

    # bare passes --------------------------------------------------------------------------

    def full(self) -> list[Tensor]:
        """Return batches of ids without padding, of about as many tokens as a step."""
        o = self.options
        flat = self.tokens.input_ids[self.tokens.mask]
        rows = flat[: len(flat) // o.length * o.length].view(-1, o.length)
        return list(rows.to(self.original.device).split(o.batch))

    def teacher(self) -> list[float]:
        """Time the teacher's forward pass."""
        model = self.original.model
        found = []
        with torch.inference_mode():
            for ids in self.full():
                began = now()
                model(input_ids=ids, use_cache=False)
                found.append((now() - began) / ids.numel())
        return found[1:]

    def student(self) -> list[float]:
        """Time the student's forward pass, and the backward pass of a gradient of its logits."""
        model = (
            reload(self.cut, dtype=self.original.dtype).to(self.original.device).train()
        )
        found = []
        for ids in self.full():
            toward = torch.full(
                (*ids.shape, model.config.get_text_config().vocab_size),
                1e-4,
                dtype=self.original.dtype,
                device=ids.device,
            )
            began = now()
            model(input_ids=ids, use_cache=False).logits.backward(toward)
            found.append((now() - began) / ids.numel())
            model.zero_grad()
        return found[1:]

    # training loops -----------------------------------------------------------------------

    def ours(self) -> list[float]:
        """Time the distillation of `isingcut heal`."""
        o = self.options
        clock = Clock()
        work = self.folder / "work"
        settings = {"max_steps": o.steps, "save_steps": 10**6}
        settings["per_device_train_batch_size"] = o.batch
        config = HealConfig(length=o.length).replace(trainer=settings)
        job = Job(
            self.original,
            self.removed,
            self.cut,
            self.tokens,
            work,
            config,
            clock.progress,
        )
        found = train(job)[0]["steps"]
        shutil.rmtree(work)
        counts = [b.tokens - a.tokens for a, b in itertools.pairwise(found)]
        predicted = counts[WARM_UP - 1 :]
        return [
            s / (n + o.batch) for s, n in zip(clock.steps(), predicted, strict=True)
        ]

    def plain(self) -> list[float]:
        """Time a hand-written distillation loop."""
        device = self.original.device
        teacher = self.original.model
        clock = Clock()
        student = reload(self.cut, dtype=torch.float32).to(device).train()
        optimiser = torch.optim.AdamW(student.parameters(), lr=2e-5, weight_decay=0.0)
        half = self.original.dtype == torch.bfloat16
        for start in range(0, self.tokens.samples, self.options.batch):
            batch = self.tokens.select(range(start, start + self.options.batch))
            mask = batch.mask.to(device)
            given = {
                "input_ids": batch.input_ids.to(device),
                "attention_mask": mask.long(),
            }
            with torch.no_grad():
                target = (
                    teacher(**given, use_cache=False)
                    .logits[:, :-1]
                    .float()
                    .log_softmax(-1)
                )
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = student(**given, use_cache=False).logits
            logq = logits[:, :-1].float().log_softmax(-1)
            each = F.kl_div(logq, target, reduction="none", log_target=True).sum(-1)
            each[mask[:, 1:]].mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            clock.advance()
        return self.per_token(clock)

    def trl(self, distilling: bool) -> list[float]:
        """Time trl's GKDTrainer with the same loss, or its SFTTrainer."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        o = self.options
        clock = Clock()
        common: dict[str, Any] = {
            "output_dir": str(self.folder / "trl"),
            "per_device_train_batch_size": o.batch,
            "max_steps": o.steps,
            "bf16": self.original.dtype == torch.bfloat16,
            "use_cpu": self.original.device.type == "cpu",
            "max_length": o.length,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "gradient_checkpointing": False,
        }
        given: dict[str, Any] = {
            "model": reload(self.cut, dtype=torch.float32),
            "train_dataset": Dataset.from_dict({"input_ids": self.tokens.rows}),
            "processing_class": self.original.tokenizer,
            "data_collator": padded,
            "callbacks": [clock],
        }
        if distilling:
            arguments: Any = GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0)
            trainer: Any = GKDTrainer(
                teacher_model=self.original.model, args=arguments, **given
            )
        else:
            trainer = SFTTrainer(args=SFTConfig(**common), **given)
        trainer.train()
        return self.per_token(clock)

    gkd = partialmethod(trl, distilling=True)
    sft = partialmethod(trl, distilling=False)

    def per_token(self, clock: Clock) -> list[float]:
        """Return the seconds per real token after the warm-up, from a step's mean tokens."""
        mean = int(self.tokens.mask.sum()) / self.options.steps
        return [s / mean for s in clock.steps()]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch in the form that trl's losses take."""
    tokens = TokenSet.from_rows([r["input_ids"] for r in rows])
    labels = tokens.input_ids.masked_fill(~tokens.mask, -100)
    return {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.mask.long(),
        "labels": labels,
    }


class Clock(TrainerCallback):
    """End times of steps, recorded as a progress bar or as a callback."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def steps(self) -> list[float]:
        """Return the seconds of every step after the warm-up."""
        return [b - a for a, b in itertools.pairwise(self.ends[WARM_UP - 1 :])]

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.advance()

    @contextlib.contextmanager
    def progress(self, description: str, total: float) -> Iterator[Any]:
        """Provide this clock as the progress bar of a training."""
        yield self if description.startswith("healing") else Mock()

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.ends.append(now())


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--model", default="smollm2")
    add("--remove", default="13-18", help="blocks the student lacks")
    add("--tiny", action="store_true", help="a tiny random model instead")
    add("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    add("--length", type=int, default=256)
    add("--batch", type=int, default=8)
    add(
        "--steps",
        type=int,
        default=4,
        help=f"of a turn; the first {WARM_UP} are a warm-up",
    )
    add("--repeats", type=int, default=3)
    add("--dtype", default="auto")
    return found


def measure(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Return the seconds per real token of every step after each turn's warm-up, by side."""
    seconds: dict[str, list[float]] = {}
    trl = importlib.util.find_spec("trl")
    names = [name for name in bench.options.sides if trl or name not in ("gkd", "sft")]
    for turn in range(repeats):
        for name in names:
            began = time.perf_counter()
            seconds.setdefault(name, []).extend(getattr(bench, name)())
            taken = time.perf_counter() - began
            BatchLimit(bench.original.device).release()
            print(f"turn {turn + 1}/{repeats}: {name} {taken:.1f} s", flush=True)
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    """Print the table."""
    print(f"{'side':<10}{'tokens/s':>10}{'ms/token':>10}")
    for name, found in seconds.items():
        ms = 1000 * statistics.median(found)
        print(f"{name:<10}{1000 / ms:>10.1f}{ms:>10.3f}")


def figures(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the ratios of the medians, for the sides that were run."""
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    if {"teacher", "student"} <= middle.keys():
        middle["both"] = middle["teacher"] + middle["student"]
    return {
        name: middle[above] / middle[below]
        for name, (above, below) in RATIOS.items()
        if {above, below} <= middle.keys()
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.steps <= WARM_UP:
        parser().error(
            f"--steps must be {WARM_UP + 1} or more, the first {WARM_UP} are a warm-up"
        )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        print(
            f"{'tiny' if options.tiny else options.model} without blocks {bench.removed.blocks}, "
            f"{bench.original.dtype_name}, "
            f"steps of {options.batch} x {options.length}, {torch.get_num_threads()} threads, "
            f"{bench.original.device}, torch {torch.__version__}",
            flush=True,
        )
        seconds = measure(bench, options.repeats)
    show(seconds)
    for name, value in figures(seconds).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
