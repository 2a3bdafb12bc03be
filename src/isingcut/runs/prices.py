"""What each measurement and stage of one model takes, before any is made.

A few of the model's own blocks are timed (`probe.py`), and multiplied by how often a run needs
what: block evaluations as the tree of states counts them, passes as a search pays for them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from isingcut.energies.pairwise import removals
from isingcut.energies.search import Target, greedy_price
from isingcut.evaluation.quality import before_and_after
from isingcut.evaluation.speed import speed
from isingcut.ising.states import States
from isingcut.measure.tree import tree_nodes
from isingcut.models.architectures import text_config
from isingcut.models.cutting.verify import verify
from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.inspect import Inspection, inspect_model
from isingcut.models.parts import BLOCK_STREAMS
from isingcut.models.streaming.memory import weight_bytes
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import RunConfig
from isingcut.options.spellings import parse_effort
from isingcut.options.types import BATCH_TOKENS
from isingcut.runs.measuring import energy_part, samples_of
from isingcut.runs.pipeline import check_by_config
from isingcut.runs.probe import probe, random_text
from isingcut.runs.removal import each_removal, removal_rows
from isingcut.runs.session import Session

# How far off an estimate may be, of what is measured on samples and of the rest: from comparisons
# with real runs (docs/big_models.md).
_DOUBT, _DOUBT_REST = 1.5, 2.0
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
        batch_tokens = config.batch_tokens or BATCH_TOKENS
        self.timings = probe(
            model,
            self.store,
            config.length,
            batch_tokens,
            attention=None if config.attention == "auto" else config.attention,
            twice=not self.streamed,
            clock=clock,
        )
        self.parts, self.n = self.timings.parts, len(self.timings.latency)
        self.weights = weight_bytes(session.source, self.store.dtype)
        found = inspect_model(session.source, trust_remote_code=config.trust_remote_code)
        self.remove = self._removed(found)
        stored = sum(b.bytes for b in found.stack.blocks)
        self.stored = stored * (1 - self.remove / self.n) + found.other_bytes
        self.left = self.stored / (stored + found.other_bytes)
        batch = random_text(model, max(1, batch_tokens // config.length), config.length)
        self.batch = int(batch.input_ids.numel())
        self.logits = int(text_config(model).vocab_size) * self.store.dtype.itemsize
        # Its other blocks do nothing now, so that this reads none of them.
        replay = StreamedReplay(model, self.store, self.memory)
        self.stream = replay.bytes_per_token
        self.room = replay.room(batch) if self.streamed else 0

    def energy(self, name: str) -> Estimate:
        """One energy, at its own number of samples where none is asked for."""
        config = self.config.replace(energy=name, linear=False, effort="")
        samples = samples_of(config, name)
        if self.streamed and not getattr(energy_part(config, name), "streams", True):
            return Estimate(name, samples, impossible="needs the whole model in memory")
        if name == "pairwise":
            return self._states(name, removals(self.n), samples)
        if name == "refined":
            return self._search(samples)
        rows = samples * self.n
        if name in ("fisher", "empirical-fisher"):
            # Streamed, the blocks run forward once more.
            again = self.parts["forward"].blocks if self.streamed else 0
            seconds = self.parts["gradients"].whole + again
            memory = self.batch * self.parts["saved"].whole + self.config.length * self.logits
            return self._measured(name, samples, seconds, memory, rows, self.n + 1, reads=2)
        if name not in self.parts:
            return Estimate(name, samples, impossible="a double backward pass failed")
        tangents = 2 * self.n * self.batch * self.stream
        memory = self.batch * self.parts["saved twice"].whole + tangents
        return self._measured(name, samples, self.parts[name].whole, memory, rows * (self.n + 1))

    def stages(self) -> tuple[Estimate, ...]:
        """What comes before and after the energy."""
        c, forward, held = self.config, self.parts["forward"], self._held()
        share, reading = 1 - self.remove / self.n, self.timings.reading * self.weights
        order = np.random.default_rng(0).random((c.states + c.random_states, self.n)).argsort(1)
        # Decoding waits for the weights, the head's among them.
        word = self.timings.word * self.weights / sum(map(self.store.size, range(self.n)))
        # Read, written, and read again; what both models write must agree.
        excise = (3 * self.left + 2 * self.streamed) * reading + 2 * _usual(
            verify, "new_tokens"
        ) * word
        seconds = c.report_samples * c.length * ((1 + share) * forward.blocks + 2 * forward.once)
        cut = int(self.left * self.weights)
        if self.streamed:
            seconds, cut = max(seconds, (1 + self.left) * reading), 0
        else:
            rounds = 1 + _usual(speed, "repeats")
            words = rounds * (3 + _usual(speed, "new_tokens")) + _usual(
                before_and_after, "new_tokens"
            )
            seconds += (1 + share) * (words * word + rounds * c.length * forward.blocks)
            # Their memory is that of two new processes.
            seconds += 2 * self.startup + (1 + self.left) * reading
        both = held + cut + 4 * self.batch * self.logits
        return (
            self._estimate("load", 0, self.startup + reading, held),
            self._states("rank", order.argsort(1) < self.remove, c.rank_samples),
            self._estimate("excise", 0, excise, held + cut, self.stored),
            self._estimate("evaluate", c.report_samples, seconds, both),
        )

    def _states(self, name: str, states: States, samples: int, share: float = 1.0) -> Estimate:
        """A share of the losses of states, which pay for every block of their tree once."""
        forward = self.parts["forward"]
        seconds = forward.whole + tree_nodes(states) * forward.blocks / self.n
        seconds = share * (seconds + len(states) * self.parts["state"].whole)
        memory = self.batch * (self.logits + (BLOCK_STREAMS + self.n + 1) * self.stream)
        numbers = int(share * 2 * samples * (len(states) + 1))
        return self._measured(name, samples, seconds, memory, numbers, len(states) + 1)

    def _search(self, samples: int) -> Estimate:
        """A budget of passes, spent on states that are much like the pairs."""
        pairs = removals(self.n)
        each = self.n / (self.n + tree_nodes(pairs))
        passes, minutes = parse_effort(self.config.effort)
        if minutes and passes is not None:
            one = self._states("refined", pairs, samples, each)
            seconds = 60 * passes
            return dataclasses.replace(one, seconds=seconds, low=seconds, high=seconds)
        passes = passes or greedy_price(self.n, self.remove)
        return self._states("refined", pairs, samples, passes * each)

    def _measured(
        self,
        name: str,
        samples: int,
        seconds: float,
        memory: float,
        numbers: int,
        streams: int = 0,
        reads: int = 1,
    ) -> Estimate:
        """A measurement, in memory or streamed.

        Args:
            seconds: of computing, a token.
            memory: beside the weights where they are all in memory.
            numbers: in the journal.
            streams: hidden states kept of each token where the model is streamed.
            reads: of the model, where all of them fit.
        """
        tokens = samples * self.config.length
        seconds *= tokens
        if not self.streamed:
            memory += self._held()
            return self._estimate(name, samples, seconds, memory, numbers * _NUMBER)
        # Reading hides behind computing where enough streams fit; else the disk sets the pace.
        once = self.timings.reading * self.weights
        sweeps = math.ceil(tokens * streams * self.stream / self.room)
        seconds = max(seconds, sweeps * reads * once) + once
        return self._estimate(name, samples, seconds, self.memory.total, numbers * _NUMBER)

    def _held(self) -> int:
        """Bytes of the process with the weights it holds."""
        return self.memory.used + (2 * self.store.largest if self.streamed else self.weights)

    def _estimate(
        self, name: str, samples: int, seconds: float, memory: float, disk: float = 0
    ) -> Estimate:
        doubt = _DOUBT if samples else _DOUBT_REST
        return Estimate(
            name,
            samples,
            seconds=seconds,
            low=seconds / doubt,
            high=seconds * doubt,
            memory=min(int(memory), self.memory.total) if self.streamed else int(memory),
            disk=int(disk),
        )

    def _removed(self, found: Inspection) -> int:
        """How many blocks go: of a budget as many as it takes; a fifth where nothing is said."""
        if not self.config.removal:
            return max(1, self.n // 5)
        costs = zip(found.stack.blocks, self.timings.latency, strict=True)
        described = {
            "blocks": [
                {**vars(b), "latency_seconds": seconds, "bytes": self.store.size(b.index)}
                for b, seconds in costs
            ],
            "legality": [vars(row) for row in found.rows],
            "total_parameters": found.parameters,
            "total_bytes": self.weights,
        }
        last = each_removal(self.config)[-1]
        return Target.of(last.removal, removal_rows(described, last), self.n).size


def _usual(function: Any, option: str) -> int:
    """What a function takes where an option is not given."""
    return int(inspect.signature(function).parameters[option].default)
