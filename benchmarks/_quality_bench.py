"""What every part of the quality benchmark shares: the model, the texts, the options."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _quality_store import Speed, Store
from isingcut.console.progress import silent, terminal
from isingcut.data.calibration import TokenSet, build
from isingcut.data.corpora import read
from isingcut.errors import CalibrationError
from isingcut.files.writing import fingerprint
from isingcut.measure.losses import Reference
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.models.sources import model_identity, resolve

REPOSITORY = Path(__file__).resolve().parents[1]
INSTRUCT = "calib_instruct"
JUDGED_RECORDS = 300
"""The last records of the instruction mix: judged on, and never chosen or measured on."""
CHOSEN_RECORDS = 600
"""The first records of it: what the second table chooses on."""


class Bench:
    """One model with the texts that blocks are chosen and judged on.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = resolve(options.model)
        self.identity = model_identity(self.folder)
        self.data = Path(options.data)
        self.own_text = bool(options.judge)
        self.store = Store(Path(options.work), self.settings())

    def settings(self) -> dict[str, Any]:
        """What all parts depend on: parts of other settings must not be mixed."""
        o = self.options
        keys = ("pool", "length", "chat_length", "judged_tokens", "questions", "dtype")
        return {
            "model_sha256": self.identity["sha256"],
            "calibration": Path(o.calibration).name,
            "judge": [Path(j).name for j in o.judge or ()],
            **{k: getattr(o, k) for k in keys},
        }

    # the model ----------------------------------------------------------------------------

    @cached_property
    def loaded(self) -> models.LoadedModel:
        return models.load(self.folder, dtype=self.options.dtype)

    @cached_property
    def replay(self) -> Replay:
        model = self.loaded.model
        return Replay(model, stack_modules(model, find_stack(model)))

    @property
    def n(self) -> int:
        return len(self.replay)

    def work(self, journal: Path | None) -> Work:
        progress = silent if self.options.quiet else terminal
        return Work(self.options.batch_tokens, progress, journal)

    @cached_property
    def speed(self) -> Speed:
        """Seconds per token, timed on one micro-batch (the fastest of three rounds)."""
        reuse_freed_memory()
        name = self.chosen_on[0]
        batch = self.pool(name).batches(self.options.batch_tokens)[-1]
        tokens = int(batch.mask.sum())
        rounds = np.zeros((3, 2))
        with torch.inference_mode():
            for taken in rounds:
                began = time.perf_counter()
                recording = self.replay.record(batch.input_ids)
                stream = recording.entered
                for i in range(self.n):
                    stream = recording.block(i, stream)
                taken[0] = time.perf_counter() - began
                reference = Reference(recording.logits(stream[0], 0), batch, 0)
                began = time.perf_counter()
                reference.compare(recording.logits(stream[0], 0))
                taken[1] = time.perf_counter() - began
        blocks, head = rounds.min(0)
        return Speed(float(blocks) / tokens, float(head) / int(batch.mask[0].sum()))

    # the texts ----------------------------------------------------------------------------

    @property
    def chosen_on(self) -> list[str]:
        """Names of the texts that blocks are chosen on."""
        first = "wiki" if self.options.calibration == "wiki" else "own"
        return [first] if self.own_text else [first, "instruct"]

    @property
    def judged_on(self) -> list[str]:
        """Names of the texts that choices are judged on."""
        if self.own_text:
            return [f"judge-{k + 1}" for k in range(len(self.options.judge))]
        return ["wikitext2", "c4", "instruct"]

    def pool(self, name: str) -> TokenSet:
        """What a method may look at: `--pool` samples of `--length` tokens, or as many tokens
        of conversations."""
        return self._tokens(name, self.options.pool * self.options.length)

    def wide_pool(self, name: str) -> TokenSet:
        """The text of methods that draw their own parts of it; the pool's samples among it."""
        return self._tokens(name, self.options.search_pool * self.options.length)

    @cached_property
    def large_pool(self) -> TokenSet:
        """The text of the long evolution; it begins with the pool's own samples."""
        return self._tokens(self.chosen_on[0], self.options.large_pool * self.options.length)

    def judged(self, name: str) -> TokenSet:
        return self._judged[name]

    @cached_property
    def _judged(self) -> dict[str, TokenSet]:
        o = self.options
        wanted = o.judged_tokens
        if self.own_text:
            sources = zip(self.judged_on, map(Path, o.judge), strict=True)
            return {name: self.sample(str(path), wanted) for name, path in sources}
        return {
            "wikitext2": self.sample(str(self.data / "wikitext2/test_raw.jsonl"), wanted),
            "c4": self.sample(str(self.data / "calib_text/c4_300.jsonl"), wanted),
            "instruct": self.sample(str(self.instruction_file("judge")), wanted),
        }

    def _tokens(self, name: str, wanted: int) -> TokenSet:
        if (name, wanted) not in self._kept_tokens:
            source = self.options.calibration
            if name == "instruct":
                source = str(self.instruction_file("choose"))
            self._kept_tokens[name, wanted] = self.sample(source, wanted)
        return self._kept_tokens[name, wanted]

    @cached_property
    def _kept_tokens(self) -> dict[tuple[str, int], TokenSet]:
        return {}

    def sample(self, source: str, wanted: int) -> TokenSet:
        """About ``wanted`` tokens: full samples of running text, or whole conversations."""
        tokenizer, length = self.loaded.tokenizer, self.options.length
        if source != "wiki" and read(source, tokenizer, 0).kind == "chat":
            return self.conversations(source, tokens=wanted)
        found = build(
            source,
            tokenizer,
            samples=max(2, round(wanted / length)),
            rank_samples=1,
            report_samples=1,
            length=length,
            seed=0,
        )
        return found.splits["energy"]

    def conversations(
        self, source: str, *, tokens: int | None = None, samples: int | None = None
    ) -> TokenSet:
        """Conversations in random order, one a sample, until there are enough.

        Raises:
            CalibrationError: the file has too few.
        """
        tokenizer = self.loaded.tokenizer
        rows: list[list[int]] = []
        held = 0
        for text in read(source, tokenizer, 0).documents:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            row = list(ids)[: self.options.chat_length]
            if len(row) < 2:
                continue
            rows.append(row)
            held += len(row)
            if (tokens is not None and held >= tokens) or len(rows) == samples:
                break
        else:
            raise CalibrationError(
                f"{source} has {len(rows)} conversations of {held} tokens; "
                f"{tokens or samples} {'tokens' if tokens else 'samples'} were asked for"
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return TokenSet.from_rows(rows, pad)

    def instruction_file(self, use: str) -> Path:
        """A file of the instruction records for one use, see `instructions`."""
        path = Path(self.options.work) / "text" / f"instruct-{use}.jsonl"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text("\n".join(instructions(self.data, use)) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def instructions(data: Path, use: str) -> list[str]:
    """The instruction records for one use, a line of JSON each; none that is judged has another.

    ``"judge"`` is the last records of the mix, ``"choose"`` the first, and ``"estimate"`` all but
    the judged ones, followed by the other instruction files.
    """
    mix = list(_lines(data / INSTRUCT / "mix1000.jsonl"))
    judged = mix[-JUDGED_RECORDS:]
    records = {"judge": judged, "choose": mix[:CHOSEN_RECORDS], "estimate": mix}[use]
    if use == "estimate":
        others = sorted((data / INSTRUCT).glob("*.jsonl"))
        records = records + [x for o in others if o.name != "mix1000.jsonl" for x in _lines(o)]
    seen = set() if use == "judge" else {_words(line) for line in judged}
    kept = []
    for line in records:
        if _words(line) not in seen:
            seen.add(_words(line))
            kept.append(line)
    return kept


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line.strip()


def _words(line: str) -> str:
    """What makes a record the same as another: its messages, white space aside."""
    messages = json.loads(line)["messages"]
    return fingerprint([" ".join(str(m["content"]).split()) for m in messages])
