"""The sides of `healing_speed.py`: each makes a few steps and says what a token of each took."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from isingcut.data import healing_text
from isingcut.data.tokens import TokenSet
from isingcut.healing.job import Job
from isingcut.healing.training.train import train
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.verify import reload
from isingcut.models.load import load
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.sources import resolve
from isingcut.options.config import HealConfig
from isingcut.options.spellings import BlockList
from isingcut.testing.tiny import tiny_checkpoint

SIDES = ("teacher", "student", "ours", "last", "plain", "gkd", "sft")
WARM_UP = 2
"""Steps of a training that are not counted."""


def now() -> float:
    """Seconds; of processor time where one thread computes: others then do not count."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


class Bench:
    """The original, the cut model and the text.

    Args:
        options: the command line's.
        folder: for checkpoints and unfinished training.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        source = tiny_checkpoint("llama", folder / "tiny") if options.tiny else options.model
        self.original = load(resolve(str(source)), dtype=options.dtype)
        self.removed = (2, 3) if options.tiny else tuple(BlockList(options.remove).numbers)
        self.cut = folder / "cut"
        excise(self.original.folder, self.removed, self.cut)
        self.numbers = itertools.count()
        # For all sides alike: what allocates afresh pays for cleared pages.
        reuse_freed_memory()

    def take(self, text: str) -> None:
        """Heal with this kind of text from now on."""
        o = self.options
        source = o.chat if text == "chat" else "wiki"
        self.tokens = healing_text.build(
            source,
            self.original.tokenizer,
            samples=o.batch * o.steps,
            report_samples=1,
            length=o.length,
            seed=0,
        ).train

    def described(self) -> str:
        """The conditions, in a line."""
        o = self.options
        return (
            f"{'tiny' if o.tiny else o.model} without {len(self.removed)} blocks, "
            f"{str(self.original.dtype).removeprefix('torch.')}, steps of {o.batch} x {o.length}, "
            f"{torch.get_num_threads()} threads, {self.original.device}, torch {torch.__version__}"
        )

    def sides(self) -> dict[str, Callable[[], list[float]]]:
        """What was asked for and can be run, by name."""
        found: dict[str, Callable[[], list[float]]] = {
            "teacher": self.teacher,
            "student": self.student,
            "ours": self.ours,
            "last": partial(self.ours, method="last:3"),
            "plain": self.plain,
        }
        if importlib.util.find_spec("trl"):
            found |= {
                "gkd": partial(self.trl, distilling=True),
                "sft": partial(self.trl, distilling=False),
            }
        return {name: found[name] for name in self.options.sides if name in found}

    # bare passes --------------------------------------------------------------------------

    def full(self) -> list[Tensor]:
        """Batches of ids without padding, of about as many tokens as are computed at a time."""
        o = self.options
        flat = self.tokens.input_ids[self.tokens.mask]
        rows = flat[: len(flat) // o.length * o.length].view(-1, o.length)
        return list(rows.to(self.original.device).split(self.micro()))

    def micro(self) -> int:
        return self.options.micro_batch or self.options.batch

    def teacher(self) -> list[float]:
        """The teacher's logits."""
        model, found = self.original.model, []
        with torch.inference_mode():
            for ids in self.full():
                began = now()
                model(input_ids=ids, use_cache=False)
                found.append((now() - began) / ids.numel())
        return found[1:]

    def student(self) -> list[float]:
        """The student's logits, and back from a gradient of them to all weights."""
        model = reload(self.cut, dtype=self.original.dtype).to(self.original.device).train()
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

    def ours(self, **changes: Any) -> list[float]:
        """The distillation of `isingcut heal`."""
        o, clock = self.options, Clock()
        work = self.folder / f"work-{next(self.numbers)}"
        settings = {"max_steps": o.steps, "save_steps": 10**6}
        settings["per_device_train_batch_size"] = self.micro()
        if o.micro_batch is not None:
            settings["gradient_accumulation_steps"] = o.batch // o.micro_batch
        config = HealConfig(length=o.length, trainer=settings, **changes)
        job = Job(self.original, self.removed, self.cut, self.tokens, work, config, clock.progress)
        found = train(job)[0]["steps"]
        shutil.rmtree(work)
        counts = [b.tokens - a.tokens for a, b in itertools.pairwise(found)]
        predicted = counts[WARM_UP - 1 :]
        return [s / (n + o.batch) for s, n in zip(clock.steps(), predicted, strict=True)]

    def batches(self) -> list[list[TokenSet]]:
        """The samples in order: steps of micro-batches, padded to their longest."""
        o, micro = self.options, self.micro()
        return [
            [self.tokens.select(range(b, b + micro)) for b in range(a, a + o.batch, micro)]
            for a in range(0, self.tokens.samples, o.batch)
        ]

    def plain(self) -> list[float]:
        """As one writes it by hand."""
        device, teacher, clock = self.original.device, self.original.model, Clock()
        student = reload(self.cut, dtype=torch.float32).to(device).train()
        optimiser = torch.optim.AdamW(student.parameters(), lr=2e-5, weight_decay=0.0)
        half = self.original.dtype == torch.bfloat16
        for step in self.batches():
            count = sum(b.tokens for b in step)
            for batch in step:
                ids, mask = batch.input_ids.to(device), batch.mask.to(device)
                given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
                with torch.no_grad():
                    target = teacher(**given).logits[:, :-1].float().log_softmax(-1)
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits = student(**given).logits
                logq = logits[:, :-1].float().log_softmax(-1)
                each = F.kl_div(logq, target, reduction="none", log_target=True).sum(-1)
                (each[mask[:, 1:]].sum() / count).backward()
            optimiser.step()
            optimiser.zero_grad()
            clock.tick()
        return self.per_token(clock)

    def trl(self, distilling: bool) -> list[float]:
        """trl's GKDTrainer with the same loss, or its SFTTrainer."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        o, clock, micro = self.options, Clock(), self.micro()
        rows = [
            ids[m].tolist() for ids, m in zip(self.tokens.input_ids, self.tokens.mask, strict=True)
        ]
        common: dict[str, Any] = {
            "output_dir": str(self.folder / "trl"),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": o.batch // micro,
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
        student = reload(self.cut, dtype=torch.float32)
        given: dict[str, Any] = {
            "model": student,
            "train_dataset": Dataset.from_dict({"input_ids": rows}),
            "processing_class": self.original.tokenizer,
            "data_collator": padded,
            "callbacks": [clock],
        }
        if distilling:
            arguments: Any = GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0)
            trainer: Any = GKDTrainer(teacher_model=self.original.model, args=arguments, **given)
        else:
            trainer = SFTTrainer(args=SFTConfig(**common), **given)
        trainer.train()
        return self.per_token(clock)

    def per_token(self, clock: Clock) -> list[float]:
        """Seconds per real token of the steps behind the warm-up; all steps count alike."""
        mean = int(self.tokens.mask.sum()) / self.options.steps
        return [s / mean for s in clock.steps()]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as trl's losses take it."""
    tokens = TokenSet.from_rows([r["input_ids"] for r in rows])
    labels = tokens.input_ids.masked_fill(~tokens.mask, -100)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.mask.long(), "labels": labels}


class Clock(TrainerCallback):
    """When steps ended, as a progress bar or a callback is told."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        self.ends.append(now())

    def steps(self) -> list[float]:
        """Seconds of every step behind the warm-up."""
        return [b - a for a, b in itertools.pairwise(self.ends[WARM_UP - 1 :])]

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.tick()

    @contextlib.contextmanager
    def progress(self, description: str, total: float) -> Iterator[Any]:
        """The bar of a training."""
        yield self if description.startswith("healing") else Mock()

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.tick()
