"""`isingcut plan`: estimate the time and memory of each energy and stage, before anything runs.

One block of each kind and the output head are timed on a micro-batch. `plan` reads only these, so
that it takes seconds even for a model far larger than memory; a run times the model that it has
loaded. Each estimate is this time multiplied by a number of passes. Nothing is written.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from isingcut.console.printing import say
from isingcut.console.progress import duration, silent
from isingcut.data.tokens import TokenSet
from isingcut.energies import registry
from isingcut.energies.base import Price, price_states
from isingcut.energies.search import Target
from isingcut.formats.architectures.blocks import text_config
from isingcut.healing.repairs import registry as repairs
from isingcut.healing.repairs.base import before_training
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.device import allowance
from isingcut.models.replay import BLOCK_STREAMS, EMBED, HEAD, Replay
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.models.streaming.store import Store
from isingcut.options.config import LENGTH, RunConfig
from isingcut.runs.checks import resolve_energy
from isingcut.runs.folder import RunFolder, each_removal
from isingcut.runs.measuring import energy_part
from isingcut.runs.session import Session, check_by_config
from isingcut.runs.solving import TIMED_TOKENS, describe_blocks, removal_rows
from isingcut.runs.trials import MORE, TOKENS, is_deep, is_searched

# Bytes per second of a disk, for a run whose weights are in memory.
_DISK = 2e9
RESIDENT = 1.54
"""Memory of a run on a card in multiples of the weights, without a quarter of the blocks that lie
apart; measured by `benchmarks/card.py`."""
# Float32 copies of a chunk of logits: two models, their difference, a gradient.
_LOGIT_COPIES = 4
# Bytes per trained number (weight, gradient, two moments).
_TRAINED = 16


@dataclass
class Estimate:
    """One line of a plan, memory in bytes; ``impossible`` is the reason if it cannot run."""

    name: str
    samples: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    impossible: str = ""


class Prices:
    """The costs of the energies and stages of one model: a timed pass, times the number of passes.

    Args:
        folder: the run folder of a run that has begun.

    Attributes:
        latency: (N,) seconds per token of each block.
        once: seconds per token of the output head and the loss.
        reading: seconds per byte of weights, read from disk and converted.
    """

    def __init__(self, session: Session, folder: RunFolder | None = None) -> None:
        config = self.config = session.config
        self.streamed = session.streaming
        self.weights = session.weights
        self.dtype = session.torch_dtype
        device = torch.device(session.device.split(",")[0])
        self.reading = 1 / _DISK
        self.memory = allowance(config.memory_limit, device)
        self.largest = 0
        if folder is None:
            found = check_by_config(session.source, config, needed=False)
        if folder is not None and not self.streamed:
            session.choose_tuning(folder)
            replay = session.replay
        else:
            store = Store(
                session.source,
                self.dtype,
                device,
                config.memory_limit,
                trust_remote_code=config.trust_remote_code,
            )
            replay = StreamedReplay(store)
            self.memory = store.memory
            # Keep the parts in memory, so that the timing below includes no reading.
            parts: list[int | str] = [EMBED, HEAD, 0]
            self.reading = sum(map(store.keep, parts)) / sum(map(store.size, parts))
            self.largest = store.largest
        vocabulary = text_config(replay.model).vocab_size
        longest = getattr(text_config(replay.model), "max_position_embeddings", None)
        length = min(config.length, session.batch_tokens, longest or config.length)
        rows = session.batch_tokens // length
        # Random tokens, so that routers spread them over the experts as in real text.
        ids = np.random.default_rng(0).integers(vocabulary, size=(rows, length))
        batch = TokenSet.from_rows(ids.tolist())
        self.batch = batch.positions
        self.latency = [s / self.batch for s in replay.latency(length, rows=rows)]
        self.once = _time_head(replay, batch) / self.batch
        self.n = len(replay)
        self.logits = vocabulary * self.dtype.itemsize
        self.stream = replay.bytes_per_token
        self.room = replay.room(batch) if self.streamed else 0
        # Bytes per token for a backward pass: half of the working memory of a block.
        self.graph = self.n * BLOCK_STREAMS // 2 * self.stream
        # By default, a fifth of the blocks is removed.
        self.remove = max(1, self.n // 5)
        if folder is not None:
            blocks = folder.run.blocks
        else:
            seconds = [
                min(TIMED_TOKENS, longest or TIMED_TOKENS) * s for s in self.latency
            ]
            size = found.other_bytes + sum(b.bytes for b in found.stack.blocks)
            blocks = describe_blocks(
                found.stack, found.rows, found.parameters, size, seconds
            )
        self.whole = blocks.total_bytes
        if config.removal:
            last = each_removal(config)[-1]
            self.remove = Target(last.removal, removal_rows(blocks, last)).size
        in_blocks = sum(b.bytes for b in blocks.blocks)
        self.left = 1 - in_blocks / self.whole * self.remove / self.n

    @property
    def forward(self) -> float:
        """The seconds per token of a forward pass."""
        return sum(self.latency) + self.once

    def beside_weights(self) -> int:
        """Return the bytes of a card that a run needs in addition to `RESIDENT` times the weights.

        They hold a sample of the tuning, and the logits of a micro-batch with a chunk in float32.
        """
        sample = self.config.length * self.graph
        logits = self.batch * self.logits + _LOGIT_COPIES * 4 * CHUNK_ELEMENTS
        return int(sample + logits)

    def energy(self, name: str) -> Estimate:
        """Estimate one energy, with its default number of samples unless the options set it."""
        part = energy_part(self.config, name)
        samples = self.config.samples or part.default_samples
        if self.streamed and not getattr(part, "streams", True):
            why = "needs the whole model in memory"
            return Estimate(name, samples, impossible=why)
        if not hasattr(part, "price"):
            return Estimate(name, samples, impossible="not estimated")
        sizes = self.config.remove.counts or [self.remove]
        return self._measurement(name, samples, part.price(self.n, sizes))

    def times(self) -> list[Estimate]:
        """Estimate what is left of a run whose model is loaded."""
        return [*map(self.energy, self.config.energies), *self.stages()[1:]]

    def stages(self) -> list[Estimate]:
        """Estimate the stages before and after the energy."""
        c = self.config
        ranked = [self._rank(removed) for removed in c.remove.counts or [self.remove]]
        seconds = sum(one.seconds for one in ranked)
        found = [self._stage("load", reads=1), replace(ranked[-1], seconds=seconds)]
        if len(ranked) > 1:
            # The user chooses one of a range to cut.
            return found
        # A checkpoint is read, written, and read again to verify it.
        found.append(self._stage("excise", reads=3))
        if c.patch != "none":
            name = before_training(c.patch) if c.heal or self.streamed else c.patch
            passes = repairs.get(name).passes
            work = 4 * c.patch_tokens * self.stream
            samples = -(-c.patch_tokens // c.length)
            found.append(
                self._stage("patch", samples, passes * c.patch_tokens, 3, work)
            )
        if c.heal:
            found.append(self._healing())
        # The original, the exact cut and the final model; the memory is that of two new processes.
        tokens = 3 * c.report_samples * c.length
        work = 4 * self.batch * self.logits
        found.append(self._stage("evaluate", c.report_samples, tokens, 2, work))
        return found

    def _rank(self, removed: int) -> Estimate:
        """Estimate the ranking of one removal, with trial patches of candidates near the lowest."""
        c = self.config
        # Random states are measured on a quarter of the text.
        states = (c.states + c.random_states // 4, self.n)
        order = np.random.default_rng(0).random(states).argsort(1).argsort(1)
        found = self._measurement("rank", c.rank_samples, price_states(order < removed))
        if c.patch != "none":
            # In deep cuts, trial patches are of the run's kind.
            trial = c.patch if is_deep(removed, self.n) else "linear"
            tokens = repairs.get(trial).passes / 2 * c.patch_tokens
            if is_searched(c, removed, self.n, streamed=self.streamed):
                # Every state reads the texts of the fit and the measurement; the original, once.
                tokens += 2 * TOKENS * (1 + (self.n + MORE) * self.left)
            found.seconds += tokens * self.forward
        return found

    def _healing(self) -> Estimate:
        """Estimate healing with a budget of time or tokens."""
        if self.streamed:
            return Estimate("heal", impossible="needs the whole model in memory")
        # A pass of the original, then forward and backward through the remaining blocks.
        passes = 1 + 3 * self.left
        tokens = self.config.heal.tokens or 0
        if seconds := self.config.heal.seconds:
            tokens = seconds / passes / self.forward
        if not tokens:
            why = "depends on the text; set a limit with --heal 10min"
            return Estimate("heal", impossible=why)
        trained = _TRAINED * self.left * self.weights / self.dtype.itemsize
        work = trained + self.batch * self.graph
        return self._stage("heal", int(tokens) // LENGTH, passes * tokens, 0, work)

    def _stage(
        self,
        name: str,
        samples: int = 0,
        tokens: float = 0,
        reads: float = 0,
        work: float = 0,
    ) -> Estimate:
        """Estimate forward passes over tokens, and reads of all weights; ``work`` in bytes."""
        seconds = tokens * self.forward + reads * self.reading * self.weights
        return Estimate(name, samples, seconds, self._weights_in_memory() + work)

    def _weights_in_memory(self) -> float:
        """Return the bytes of the process with its weights, or with two buffers if streamed."""
        return self.memory.used + (2 * self.largest if self.streamed else self.weights)

    def _measurement(self, name: str, samples: int, price: Price) -> Estimate:
        """Estimate a measurement, in memory or streamed."""
        tokens = samples * self.config.length
        # With streaming, blocks run forward once more in the backward pass.
        again = price.gradients and self.streamed
        seconds = tokens * (price.passes * sum(self.latency) + price.heads * self.once)
        seconds += again * tokens * self.forward
        if self.streamed:
            # Reading overlaps with computing if enough hidden states fit; otherwise the disk is the
            # limit. Every block is read in the forward and in the backward pass.
            reading = self.reading * self.weights
            streams = 2 * (self.n + 1) if price.gradients else price.heads
            sweeps = math.ceil(tokens * streams * self.stream / self.room)
            seconds = max(seconds, sweeps * reading) + reading
            return Estimate(name, samples, price.seconds or seconds, self.memory.total)
        kept = (BLOCK_STREAMS + self.n + 1) * self.stream
        work = self.logits + (self.graph if price.gradients else kept)
        memory = self._weights_in_memory() + self.batch * work
        return Estimate(name, samples, price.seconds or seconds, memory)


def _time_head(replay: Replay, batch: TokenSet) -> float:
    """Return the seconds of the output head and the loss on a micro-batch."""
    seconds = []
    with torch.inference_mode():
        recording = replay.record(batch.input_ids)
        stream = recording.move_to_block(len(replay) - 1, recording.entered)
        logits = partial(OutputHead(replay).logits, recording, stream, batch)
        original = Comparison(logits(), batch)
        for _ in range(3):
            began = time.perf_counter()
            original.sum_samples([original.compare(logits())])
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def say_times(session: Session, folder: RunFolder) -> None:
    """Print the time of each stage of a run, from its first removals; nothing if it is resumed."""
    file = folder.path / "hamiltonian.safetensors"
    alone = session.processes.size == 1
    if session.progress is silent or not alone or folder.find_record(file):
        return
    prices = Prices(session, folder)
    quick = copy.copy(prices)
    quick.config = session.config.replace(quick=True)
    total, less = (sum(one.seconds for one in p.times()) for p in (prices, quick))
    parts = [
        f"{one.name} {one.impossible or duration(one.seconds)}"
        for one in prices.times()
        if one.impossible or one.seconds > total / 100
    ]
    hint = "" if session.config.quick else f"; with --quick {duration(less)}"
    say(f"this run takes about {duration(total)} here ({', '.join(parts)}){hint}")


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Time a pass of a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` for the stages after the energy.

    Returns:
        the content of `plan --json`: ``weights``, ``allowed`` and ``checkpoint`` in bytes,
        the size of a card that holds a run (``card_weights`` times the weights + ``card_bytes``),
        ``forward`` in tokens per second, ``reading`` in bytes per second, ``energies`` and
        ``stages``, and ``seconds`` of a whole run with ``energy``, or of the energy alone without
        a removal.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    config = resolve_energy(config)
    began = time.perf_counter()
    session = Session(config)
    prices = Prices(session)
    names = [name for name in registry.names() if name not in registry.choices]
    stages = prices.stages()
    done = [*(stages if config.removal else stages[:1]), prices.energy(config.energy)]
    return {
        "model": config.model,
        "blocks": prices.n,
        "remove": prices.remove,
        "device": session.device,
        "dtype": session.dtype,
        "weights": prices.weights,
        "allowed": prices.memory.total,
        "checkpoint": int(prices.left * prices.whole),
        "card_weights": RESIDENT,
        "card_bytes": prices.beside_weights(),
        "streamed": prices.streamed,
        "forward": 1 / prices.forward,
        "reading": 1 / max(1e-15, prices.reading),
        "energies": [asdict(prices.energy(name)) for name in names],
        "stages": [asdict(stage) for stage in stages],
        "energy": config.energy,
        "seconds": sum(one.seconds for one in done),
        "probe_seconds": time.perf_counter() - began,
    }
