"""`isingcut plan`: estimate the time and memory of each energy and stage, before anything runs.

A forward pass is timed on one block of each kind and on the output head. Only these are read, so
that planning takes seconds even for a model far larger than memory. Each estimate is this time
multiplied by a number of passes. Nothing is written.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isingcut.console.printing import say
from isingcut.console.progress import duration, silent
from isingcut.data.tokens import TokenSet
from isingcut.energies import registry
from isingcut.energies.base import Price, price_states
from isingcut.energies.search import Target
from isingcut.healing.repairs import registry as repairs
from isingcut.healing.repairs.base import before_training
from isingcut.measure.losses import measure, tree_nodes
from isingcut.measure.work import Work
from isingcut.models.compute.divergence import CHUNK_ELEMENTS
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.device import Allowance, pick_device, pick_dtype, weight_bytes
from isingcut.models.inspect import Inspection, inspect_model
from isingcut.models.load import load_config
from isingcut.models.replay import BLOCK_STREAMS, EMBED, HEAD
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import LENGTH, RunConfig
from isingcut.options.declaration import flag
from isingcut.runs.folder import RunFolder, each_removal
from isingcut.runs.measuring import energy_part, splits_of
from isingcut.runs.session import Session, check_by_config
from isingcut.runs.solving import TIMED_TOKENS, describe_blocks, removal_rows
from isingcut.runs.trials import MORE, TOKENS, is_deep, is_searched

MOST_HOURS = 8
"""Longest run to recommend, in hours."""
# Bytes per second of a disk, for a run whose weights are in memory.
_DISK = 2e9
# Share of the whole search below which a search is not worthwhile.
_LEAST = 0.125
RESIDENT = 1.54
"""Memory of a run on a card in multiples of the weights, without a quarter of the blocks that lie
apart; measured by `benchmarks/card.py`."""
# Float32 copies of a chunk of logits: two models, their difference, a gradient.
_LOGIT_COPIES = 4
# Bytes per trained number (weight, gradient, two moments).
_TRAINED = 16


Run = tuple[Session, RunFolder]
# Single removals that a run times before its energy.
_SINGLES = 4


class Prices:
    """The costs of the energies and stages of one model: a timed pass, times the number of passes.

    Attributes:
        latency: (N,) seconds per token of each block.
        once: seconds per token of the output head and the loss.
        reading: seconds per byte of weights, read from disk and converted.
    """

    def __init__(self, config: RunConfig, run: Run | None = None) -> None:
        self.config = config
        session = Session(config) if run is None else run[0]
        source = session.source
        if run is None:
            check_by_config(source, config, needed=False)
        names = (
            "dtype",
            "device",
            "memory_limit",
            "cards_per_process",
            "trust_remote_code",
        )
        found = inspect_model(source, **{name: getattr(config, name) for name in names})
        trust = config.trust_remote_code
        text = load_config(source, trust_remote_code=trust).get_text_config(
            decoder=True
        )
        self.n = len(found.stack)
        self.placement = found.placement
        if run is None:
            self._time(session, found, text)
        else:
            self._time_removals(*run, found)
        self.weights = weight_bytes(source, self.dtype)
        self.in_blocks = sum(b.bytes for b in found.stack.blocks)
        self.whole = self.in_blocks + found.other_bytes
        self.logits = int(text.vocab_size) * self.dtype.itemsize
        # By default, a fifth of the blocks is removed.
        self.remove = max(1, self.n // 5)
        if config.removal:
            last = each_removal(config)[-1]
            parameters = found.parameters
            seconds = [
                min(TIMED_TOKENS, found.positions or TIMED_TOKENS) * s
                for s in self.latency
            ]
            if run is None:
                blocks = describe_blocks(
                    found.stack, found.rows, parameters, self.whole, seconds
                )
            else:
                blocks = run[1].run.blocks
            self.remove = Target(last.removal, removal_rows(blocks, last)).size
        self.left = 1 - self.in_blocks / self.whole * self.remove / self.n
        # Bytes per token for a backward pass: half of the working memory of a block.
        self.graph = self.n * BLOCK_STREAMS // 2 * self.stream

    def _time(self, session: Session, found: Inspection, text: Any) -> None:
        """Time one block of each kind, the output head and the disk of this machine.

        Raises:
            ArchitectureError: the blocks cannot be run one at a time.
        """
        config = self.config
        self.streamed = session.streaming
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(session.dtype, self.device)
        model, store, self.memory = open_model(
            session.source,
            dtype=self.dtype,
            device=self.device,
            memory_limit=config.memory_limit,
            trust_remote_code=config.trust_remote_code,
        )
        self.largest = store.largest
        replay = StreamedReplay(model, store, self.memory)
        self.batch = min(session.batch_tokens, found.positions or self.memory.total)
        # Random tokens, so that routers spread them over the experts as in real text.
        ids = np.random.default_rng(0).integers(
            int(text.vocab_size), size=(1, self.batch)
        )
        batch = TokenSet.from_rows(ids.tolist())
        # Keep the parts in memory, so that the timing below includes no reading.
        parts: list[int | str] = [EMBED, HEAD, 0]
        self.reading = sum(map(store.keep, parts)) / sum(map(store.size, parts))
        self.latency = [s / batch.positions for s in replay.latency(batch.positions)]
        with torch.inference_mode():
            recording = replay.record(batch.input_ids)
            seconds = []
            logits = partial(
                OutputHead(replay).logits, recording, recording.entered, batch
            )
            original = Comparison(logits(), batch)
            for _ in range(3):
                began = time.perf_counter()
                original.sum_samples([original.compare(logits())])
                seconds.append(time.perf_counter() - began)
        self.once = min(seconds) / batch.positions
        self.stream = replay.bytes_per_token
        self.room = replay.room(batch) if self.streamed else 0

    def _time_removals(
        self, session: Session, folder: RunFolder, found: Inspection
    ) -> None:
        """Time the original and a few single removals of a run, on one micro-batch of its text."""
        session.choose_tuning(folder)
        replay = session.replay
        self.batch = session.batch_tokens
        self.streamed = session.streaming
        split = splits_of(folder)["energy"]
        work = Work(session.batch_tokens)
        batch = split.batches(self.batch)[0]
        last = np.eye(self.n, dtype=bool)[-_SINGLES:]

        def seconds(tokens: TokenSet, states: Any) -> float:
            began = time.perf_counter()
            measure(replay, tokens, states, work)
            return time.perf_counter() - began

        # The first measurement takes longer.
        seconds(split.select([0]), last)
        more = seconds(batch, last)
        whole = seconds(batch, [])
        # The removals run the shared blocks once, and the output head for each.
        extra = tree_nodes(last) / self.n
        head = (more - whole * (1 + extra)) / (len(last) - extra)
        self.once = min(max(0.0, head), whole) / batch.positions
        known = [b.latency_seconds or 1e-9 for b in folder.run.blocks.blocks]
        each = (whole / batch.positions - self.once) / sum(known)
        self.latency = [each * latency for latency in known]
        self.dtype = session.loaded.dtype
        streamed = whole / weight_bytes(session.source, self.dtype)
        self.reading = streamed if self.streamed else 1 / _DISK
        self.stream = replay.bytes_per_token
        self.room = replay.room(batch)
        # Only the times of a run that has begun matter.
        self.memory = Allowance(0, 0)
        self.largest = 0

    @property
    def forward(self) -> float:
        """The seconds per token of a forward pass."""
        return sum(self.latency) + self.once

    def energy(self, name: str) -> dict[str, Any]:
        """Estimate one energy, with its default number of samples unless the options set it."""
        part = energy_part(self.config, name)
        samples = self.config.samples or part.default_samples
        if self.streamed and not getattr(part, "streams", True):
            return _estimate(
                name, samples, impossible="needs the whole model in memory"
            )
        if not hasattr(part, "price"):
            return _estimate(name, samples, impossible="not estimated")
        sizes = self.config.remove.counts or [self.remove]
        return self._measurement(name, samples, part.price(self.n, sizes))

    def times(self) -> list[dict[str, Any]]:
        """Estimate what is left of a run whose model is loaded."""
        return [*map(self.energy, self.config.energies), *self.stages()[1:]]

    def stages(self) -> list[dict[str, Any]]:
        """Estimate the stages before and after the energy."""
        c = self.config
        weights = self._weights_in_memory()
        forward = self.forward
        reading = self.reading * self.weights
        work = self.batch * self.logits
        ranked = [self._rank(removed) for removed in c.remove.counts or [self.remove]]
        seconds = sum(one["seconds"] for one in ranked)
        found = [
            _estimate("load", 0, reading, weights),
            ranked[-1] | {"seconds": seconds},
        ]
        if len(ranked) > 1:
            # The user chooses one of a range to cut.
            return found
        # A checkpoint is read, written, and read again to verify it.
        found.append(_estimate("excise", 0, 3 * reading, weights))
        if c.patch != "none":
            name = before_training(c.patch) if c.heal or self.streamed else c.patch
            passes = repairs.get(name).passes
            seconds = 3 * reading + passes * c.patch_tokens * forward
            memory = weights + 4 * c.patch_tokens * self.stream
            found.append(
                _estimate("patch", -(-c.patch_tokens // c.length), seconds, memory)
            )
        if c.heal:
            found.append(self._healing())
        # The original, the exact cut and the final model; the memory is that of two new processes.
        seconds = 3 * c.report_samples * c.length * forward + 2 * reading
        found.append(
            _estimate("evaluate", c.report_samples, seconds, weights + 4 * work)
        )
        return found

    def _rank(self, removed: int) -> dict[str, Any]:
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
            found["seconds"] += tokens * self.forward
        return found

    def _healing(self) -> dict[str, Any]:
        """Estimate healing with a budget of time or tokens."""
        tokens = self.config.heal.tokens
        seconds = self.config.heal.seconds
        # A pass of the original, then forward and backward through the remaining blocks.
        each = self.forward * (1 + 3 * self.left)
        if self.streamed:
            return _estimate("heal", 0, impossible="needs the whole model in memory")
        if tokens is None and seconds is None:
            why = "depends on the text; set a limit with --heal 10min"
            return _estimate("heal", 0, impossible=why)
        tokens = tokens if seconds is None else seconds / each
        trained = _TRAINED * self.left * self.weights / self.dtype.itemsize
        memory = self._weights_in_memory() + trained + self.batch * self.graph
        return _estimate(
            "heal", int(tokens or 0) // LENGTH, (tokens or 0) * each, memory
        )

    def _weights_in_memory(self) -> float:
        """Return the bytes of the process with its weights, or with two buffers if streamed."""
        return self.memory.used + (2 * self.largest if self.streamed else self.weights)

    def _measurement(self, name: str, samples: int, price: Price) -> dict[str, Any]:
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
            return _estimate(name, samples, price.seconds or seconds, self.memory.total)
        kept = (BLOCK_STREAMS + self.n + 1) * self.stream
        work = self.logits + (self.graph if price.gradients else kept)
        memory = self._weights_in_memory() + self.batch * work
        return _estimate(name, samples, price.seconds or seconds, memory)


def say_times(session: Session, folder: RunFolder) -> None:
    """Print the time of each stage of a run, from its first removals; nothing if it is resumed."""
    config = session.config
    file = folder.path / "hamiltonian.safetensors"
    if (
        session.progress is silent
        or session.processes.size > 1
        or folder.find_record(file)
    ):
        return
    prices = Prices(config, (session, folder))
    quick = copy.copy(prices)
    quick.config = config.replace(quick=True)
    total, less = (sum(one["seconds"] for one in p.times()) for p in (prices, quick))
    rows = [
        one
        for one in prices.times()
        if one["impossible"] or one["seconds"] > total / 100
    ]
    parts = [
        f"{one['name']} {one['impossible'] or duration(one['seconds'])}" for one in rows
    ]
    hint = "" if config.quick else f"; with --quick {duration(less)}"
    say(f"this run takes about {duration(total)} here ({', '.join(parts)}){hint}")


def _estimate(
    name: str,
    samples: int,
    seconds: float = 0.0,
    memory: float = 0,
    impossible: str = "",
) -> dict[str, Any]:
    """Make one line of a plan, memory in bytes; ``impossible`` is the reason if it cannot run."""
    found = {"name": name, "samples": samples, "impossible": impossible}
    return found | {"seconds": seconds, "memory": int(memory)}


def card_bytes(prices: Prices) -> int:
    """Return the bytes of a card that a run needs in memory: `RESIDENT` times the weights, a sample
    of the patch's tuning, and the logits of a micro-batch with a chunk of them in float32."""
    sample = prices.config.length * prices.graph
    logits = prices.batch * prices.logits + _LOGIT_COPIES * 4 * CHUNK_ELEMENTS
    return int(RESIDENT * prices.weights + sample + logits)


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Time a pass of a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` for the stages after the energy.

    Returns:
        the content of `plan --json`: ``weights``, ``allowed``, ``checkpoint`` and ``card_bytes``
        (see `card_bytes`) in bytes, ``forward`` in tokens per second, ``reading`` in bytes per
        second, ``energies`` and ``stages``, and ``seconds`` of the whole run that ``command``
        starts.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    began = time.perf_counter()
    prices = Prices(config)
    energies = [
        prices.energy(name) for name in registry.names() if name not in registry.choices
    ]
    stages = prices.stages()
    seconds = {e["name"]: e["seconds"] for e in energies}
    # Without a removal, the command only loads the model and measures its energy.
    rest = sum(s["seconds"] for s in (stages if config.removal else stages[:1]))
    recommended, effort, why = advise(config, seconds, rest)
    return {
        "model": config.model,
        "blocks": prices.n,
        "remove": prices.remove,
        "device": str(prices.device),
        "placement": {} if prices.streamed else prices.placement,
        "dtype": str(prices.dtype).removeprefix("torch."),
        "weights": prices.weights,
        "allowed": prices.memory.total,
        "checkpoint": int(prices.left * prices.whole),
        "card_bytes": card_bytes(prices),
        "card_weights": RESIDENT,
        "streamed": prices.streamed,
        "forward": 1 / prices.forward,
        "reading": 1 / max(1e-15, prices.reading),
        "energies": energies,
        "stages": stages,
        "recommended": recommended,
        "seconds": seconds[recommended] + rest,
        "why": why,
        "command": command(config, recommended, effort),
        "probe_seconds": time.perf_counter() - began,
    }


def advise(
    config: RunConfig, seconds: Mapping[str, float], rest: float
) -> tuple[str, str, str]:
    """Choose the best energy that fits in `MOST_HOURS` hours; return it, its effort and the reason.

    Args:
        config: the options.
        seconds: time of each energy.
        rest: time of all other stages.
    """
    room = MOST_HOURS * 3600 - rest
    if config.removal and seconds["refined"] <= room:
        return "refined", config.effort, "it ranks best near one removal"
    if seconds["pairwise"] <= room:
        return "pairwise", "", "it is measured and works for every removal"
    if config.removal and _LEAST * seconds["refined"] <= room:
        why = f"the whole search takes more than {MOST_HOURS} hours; this effort fits"
        return "refined", f"{max(1, int(room / 3600))}h", why
    why = f"measured energies take more than {MOST_HOURS} hours here; this one is only a guide: "
    return "fisher", "", why + "check its fidelity in the report"


def command(config: RunConfig, energy: str, effort: str = "") -> str:
    """Return the command line for an energy, with the given options."""
    words = ["isingcut", "run" if config.removal else "energy", config.model]
    own = {"model", "energy", "effort", "out"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # `energy` has no options of the later stages.
        known = config.removal or field.metadata["stage"] in (
            "model",
            "calibration",
            "energy",
        )
        if known and value != field.default and field.name not in own:
            words += [flag(field)] if value is True else [flag(field), str(value)]
    words += ["--energy", energy, *(["--effort", effort] if effort else [])]
    name = Path(config.model).name.removesuffix(".gguf") or "model"
    return shlex.join([*words, "--out", f"{name}-run"])
