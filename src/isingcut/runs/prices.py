"""What each measurement and stage of one model takes, before any is made.

A pass through the model is timed on a few of its own blocks (`probe.py`), and multiplied by how
often a run needs it: block evaluations as the tree of states counts them, passes as an energy's
derivatives and a search take them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from isingcut.energies.pairwise import removals
from isingcut.energies.search import greedy_price
from isingcut.evaluation.candidates import few_samples
from isingcut.healing.patch.tuning import BYTES
from isingcut.healing.recipe import sizes
from isingcut.ising.states import States
from isingcut.measure.curvature import KINDS
from isingcut.measure.tree import tree_nodes
from isingcut.models.architectures import text_config
from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.inspect import inspect_model
from isingcut.models.memory import weight_bytes
from isingcut.models.parts import BLOCK_STREAMS
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import RunConfig
from isingcut.options.spellings import parse_effort, parse_healing
from isingcut.runs.healing_options import heal_config
from isingcut.runs.measuring import energy_part, samples_of
from isingcut.runs.pipeline import check_by_config
from isingcut.runs.probe import probe, random_text, removed_count
from isingcut.runs.session import Session
from isingcut.runs.trials import SHARE

# How far off an estimate may be, of what is measured on samples and of the rest: from comparisons
# with real runs (docs/big_models.md).
_DOUBT, _DOUBT_REST = 1.5, 2.0
# Passes of all gradients, or of each row of a matrix, through the blocks and through the head: as
# `gate_gradients` and `gate_curvature` say.
_PASSES = {
    "empirical-fisher": (2.3, 2.3),
    "fisher": (2.3, 2.3),
    "hessian": (1.7, 2.5),
    "gauss-newton": (0.6, 2.5),
}
# The fit of a patch, of the passes that it takes: its least squares are the rest.
_FIT = 1.5
# Passes of tuning it, for each token of the text; and the part of the blocks behind the first cut.
_TUNE, _BEHIND = 5.25, 0.6
# Passes of a training, forward and back; bytes of a number that is trained (itself, its gradient,
# two moments), and of it in a saved state.
_TRAIN, _TRAINED, _STATE = 3, 16, 12
# Second moments of a patch, in numbers of eight bytes: of both sides, their sum, its factors.
_MOMENTS = 6
# What graphs that are differentiated again keep, beside those of gradients.
_TWICE = 5
# A number in a journal.
_NUMBER = 8


@dataclass(frozen=True)
class Estimate:
    """One line of a plan.

    Attributes:
        name: of an energy or a stage.
        samples: it is measured on; 0 where it needs none.
        seconds: expected; ``low`` and ``high`` are the ends of the range it should lie in.
        memory: peak, bytes.
        disk: bytes written.
        impossible: why it cannot be done here; empty where it can.
    """

    name: str
    samples: int
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    memory: int = 0
    disk: int = 0
    impossible: str = ""


class Prices:
    """What one model's measurements and stages take: its timed parts, times how often each runs."""

    def __init__(self, config: RunConfig, clock: Callable[[], float]) -> None:
        # What every process needs before it can begin.
        self.startup = max(1.0, time.time() - psutil.Process().create_time())
        self.config, session = config, Session(config)
        check_by_config(session.source, config, needed=False)
        self.streamed, device = session.streaming, pick_device(config.device)
        model, self.store, self.memory = open_model(
            session.source,
            dtype=pick_dtype(session.dtype, device),
            device=device,
            memory_limit=config.memory_limit,
            trust_remote_code=config.trust_remote_code,
        )
        how = session.tuning
        self.timings = probe(
            model, self.store, config.length, how.batch_tokens, how.attention, clock
        )
        self.n = len(self.timings.latency)
        self.weights = weight_bytes(session.source, self.store.dtype)
        found = inspect_model(session.source, trust_remote_code=config.trust_remote_code)
        size = self.store.size
        self.remove = removed_count(config, found, self.timings.latency, size, self.weights)
        stored = sum(b.bytes for b in found.stack.blocks)
        self.stored = stored * (1 - self.remove / self.n) + found.other_bytes
        self.left = self.stored / (stored + found.other_bytes)
        batch = random_text(model, max(1, how.batch_tokens // config.length), config.length)
        self.batch = int(batch.input_ids.numel())
        self.logits = int(text_config(model).vocab_size) * self.store.dtype.itemsize
        # Its other blocks do nothing now, so that this reads none of them.
        replay = StreamedReplay(model, self.store, self.memory)
        self.stream = replay.bytes_per_token
        # What a patched layer reads, where the configuration says it.
        inner = getattr(text_config(model), "intermediate_size", None)
        width = self.stream // self.store.dtype.itemsize
        self.inner = inner if isinstance(inner, int) else 4 * width
        self.room = replay.room(batch) if self.streamed else 0

    def energy(self, name: str) -> Estimate:
        """One energy, at its own number of samples where none is asked for."""
        config, t = self.config.replace(energy=name, linear=False, effort=""), self.timings
        samples, n = samples_of(config, name), self.n
        if self.streamed and not getattr(energy_part(config, name), "streams", True):
            return Estimate(name, samples, impossible="needs the whole model in memory")
        if name == "pairwise":
            return self._states(name, removals(n), samples)
        if name == "refined":
            return self._search(samples)
        # A matrix has a row for each block, and a tangent; streamed, blocks run forward once more.
        rows, (blocks, once) = (n if name in KINDS else 1), _PASSES[name]
        seconds = rows * ((blocks + self.streamed) * t.blocks + once * t.once)
        if rows == 1:
            kept = self.batch * t.saved + config.length * self.logits
        else:
            kept = self.batch * (_TWICE * t.saved + 2 * n * self.stream)
        disk = samples * n * rows * _NUMBER
        seconds *= samples * config.length
        return self._estimate(name, samples, seconds, self._held() + kept, disk, n + 1, reads=2)

    def stages(self) -> tuple[Estimate, ...]:
        """What comes before and after the energy."""
        c, t = self.config, self.timings
        share, reading = 1 - self.remove / self.n, t.reading * self.weights
        # Random states are measured on a part of the text: as dear as a part of them on all of it.
        few = len(few_samples(c.rank_samples)) / c.rank_samples
        count = c.states + math.ceil(few * c.random_states)
        order = np.random.default_rng(0).random((count, self.n)).argsort(1)
        # Both models are read, and run over the text; what they write in words is left out.
        both_pass = (1 + share) * t.blocks + 2 * t.once
        # A patched model stands beside the exact cut, which is the original without blocks.
        seconds = c.report_samples * c.length * both_pass * (1 if c.patch == "none" else 2)
        both, cut = (1 + self.left) * reading, int(self.left * self.weights)
        if self.streamed:
            seconds, cut = max(seconds, both), 0
        else:
            # Their memory is that of two new processes.
            seconds += 2 * self.startup + both
        memory = self._held() + cut
        logits = 4 * self.batch * self.logits
        return (
            self._estimate("load", 0, self.startup + reading, self._held()),
            self._states("rank", order.argsort(1) < self.remove, c.rank_samples),
            # Read, written, and read again.
            self._estimate(
                "excise", 0, (3 * self.left + 3 * self.streamed) * reading, memory, self.stored
            ),
            *([] if c.patch == "none" else [self._patch(share)]),
            *([self._heal()] if c.heal else []),
            self._estimate("evaluate", c.report_samples, seconds, memory + logits),
        )

    def _patch(self, share: float) -> Estimate:
        """A pass of the original and one of what is kept, the maps, and another proof."""
        c, wide, width = self.config, self.inner, self.stream // self.store.dtype.itemsize
        samples = -(-c.patch_tokens // c.length)
        seconds = _FIT * c.patch_tokens * (1 + share) * self.timings.blocks
        kept = c.patch_tokens * (4 * self.stream + wide * self.store.dtype.itemsize)
        memory = self._held() + kept + _MOMENTS * _NUMBER * wide * (wide + width)
        if c.patch == "tuned" and not c.heal and not self.streamed:
            # Two blocks beside a cut; each further cut takes as much again, or less is tuned.
            tuned = BYTES * 2 * self.weights / self.n / self.store.dtype.itemsize
            memory = max(memory, self._held() + 2 * c.patch_tokens * self.stream + int(tuned))
            # A pass of the original, then twice forward and backward from the first cut on.
            t = self.timings
            once = t.blocks + t.once + _TUNE * (share * _BEHIND * t.blocks + 2 * t.once)
            seconds += c.patch_tokens * once
        seconds += 3 * self.left * self.timings.reading * self.weights
        return self._estimate("patch", samples, seconds, memory, self.stored, streams=4)

    def healing(self) -> dict[str, Any] | None:
        """What a budget of healing buys, about; None without one, or where it is all of a text."""
        c, t = self.config, self.timings
        tokens, seconds = parse_healing(c.heal)
        # A pass of the original, then forward and back through what is kept.
        each = t.blocks + t.once + _TRAIN * ((1 - self.remove / self.n) * t.blocks + t.once)
        tokens = seconds / each if seconds is not None else tokens
        if tokens is None:
            return None
        trials = int(tokens * SHARE) if c.tried else 0
        left, width = int(tokens) - trials, self.stream // self.store.dtype.itemsize
        batch, length, rate = sizes(heal_config(c), left, width=width)
        return {
            "budget": c.heal,
            "tokens": left,
            "trial_tokens": trials,
            "steps": max(1, left // (batch * length)),
            "batch": batch,
            "length": length,
            "learning_rate": rate,
            "seconds": tokens * each,
        }

    def _heal(self) -> Estimate:
        """A training of all weights, and of the candidates that are tried before."""
        found = self.healing()
        if found is None or self.streamed:
            why = "as long as its text is; a budget (--heal 10min) says how long"
            return Estimate(
                "heal", 0, impossible="needs the whole model in memory" if found else why
            )
        trained = self.left * self.weights / self.store.dtype.itemsize
        kept = min(self.batch, found["batch"] * found["length"]) * self.timings.saved
        memory = self._held() + _TRAINED * trained + kept
        samples, disk = found["steps"] * found["batch"], 2 * _STATE * trained
        one = self._estimate("heal", samples, found["seconds"], memory, disk)
        if parse_healing(self.config.heal)[1] is not None:
            one = dataclasses.replace(one, low=found["seconds"], high=found["seconds"])
        return one

    def _states(self, name: str, states: States, samples: int, share: float = 1.0) -> Estimate:
        """A share of the losses of states, which pay for every block of their tree once."""
        t, count = self.timings, len(states)
        passes = (1 + tree_nodes(states) / self.n) * t.blocks + (1 + count) * t.once
        seconds = share * samples * self.config.length * passes
        streams = self.batch * (BLOCK_STREAMS + self.n + 1) * self.stream
        memory = self._held() + self.batch * self.logits + streams
        disk = int(share * 2 * samples * (count + 1)) * _NUMBER
        return self._estimate(name, samples, seconds, memory, disk, count + 1)

    def _search(self, samples: int) -> Estimate:
        """A budget of passes, spent on states that are much like the pairs."""
        pairs = removals(self.n)
        passes, minutes = parse_effort(self.config.effort)
        each = self.n / (self.n + tree_nodes(pairs))
        if minutes and passes is not None:
            one, seconds = self._states("refined", pairs, samples, each), 60 * passes
            return dataclasses.replace(one, seconds=seconds, low=seconds, high=seconds)
        passes = passes or greedy_price(self.n, self.remove)
        return self._states("refined", pairs, samples, passes * each)

    def _held(self) -> int:
        """Bytes of the process with the weights it holds."""
        return self.memory.used + (2 * self.store.largest if self.streamed else self.weights)

    def _estimate(
        self,
        name: str,
        samples: int,
        seconds: float,
        memory: float,
        disk: float = 0,
        streams: int = 0,
        reads: int = 1,
    ) -> Estimate:
        """One line, in memory or streamed.

        Args:
            seconds: of computing.
            streams: hidden states kept of each token where the model is streamed.
            reads: of the model, where all of them fit.
        """
        if self.streamed and streams:
            # Reading hides behind computing where enough streams fit; else the disk sets the pace.
            once, memory = self.timings.reading * self.weights, self.memory.total
            sweeps = math.ceil(samples * self.config.length * streams * self.stream / self.room)
            seconds = max(seconds, sweeps * reads * once) + once
        elif self.streamed:
            memory = min(memory, self.memory.total)
        doubt = _DOUBT if samples else _DOUBT_REST
        low, high = seconds / doubt, seconds * doubt
        return Estimate(name, samples, seconds, low, high, int(memory), int(disk))
