"""`isingcut plan`: what each energy and stage takes on this machine, before anything runs.

A forward pass is timed on one block of each kind and on the output head. Only these are read, so
that a model far larger than memory is planned in seconds. Each estimate is a number of passes times
that; nothing is written.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isingcut.data.tokens import TokenSet
from isingcut.energies.pairwise import removals
from isingcut.energies.search import Target, greedy_price
from isingcut.evaluation.candidates import few_samples
from isingcut.healing.recipe import sizes
from isingcut.measure.curvature import KINDS
from isingcut.measure.losses import tree_nodes
from isingcut.models.architectures import text_config
from isingcut.models.compute.head import OutputHead, comparison
from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.inspect import Inspection, inspect_model
from isingcut.models.memory import weight_bytes
from isingcut.models.parts import BLOCK_STREAMS, EMBED, HEAD
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import RunConfig
from isingcut.options.spellings import parse_healing
from isingcut.runs.healing_options import heal_config
from isingcut.runs.measuring import energy_part, samples_of
from isingcut.runs.pipeline import check_by_config
from isingcut.runs.removal import each_removal, removal_rows
from isingcut.runs.session import Session
from isingcut.runs.trials import SHARE

ENERGIES = ("empirical-fisher", "fisher", "gauss-newton", "hessian", "pairwise", "refined")
EVENING = 8.0
"""Hours that a run may take before the recommendation turns to less."""
DOUBT = 2.0
"""How far off an estimate may be, up or down: passes are counted, and few parts are timed."""
PASSES = {"empirical-fisher": 2.5, "fisher": 2.5, "gauss-newton": 1.0, "hessian": 2.0}
"""Forward passes of an energy of derivatives; of a matrix, for each of its rows."""
_PATCH = {"linear": 3, "tuned": 8}
# Share of the whole search below which it is not worth beginning.
_LEAST = 0.125
# Bytes of a number that is trained (itself, its gradient, two moments).
_TRAINED = 16


@dataclass(frozen=True)
class TimedPass:
    """A forward pass of a model on this machine.

    Attributes:
        latency: (N,) seconds of each block for a token.
        once: seconds for a token of what comes once, the output head and the loss.
        reading: seconds for a byte of weights, read from disk and converted.
    """

    latency: Sequence[float]
    once: float
    reading: float

    @property
    def seconds(self) -> float:
        """Of all of it, for a token."""
        return sum(self.latency) + self.once


def time_pass(replay: StreamedReplay, batch: TokenSet) -> TimedPass:
    """Time one block of each kind, the output head and the disk.

    Raises:
        ArchitectureError: the blocks cannot be run one at a time.
    """
    store, tokens = replay.store, batch.positions
    # Kept, so that no reading is timed below.
    parts: list[int | str] = [EMBED, HEAD, 0]
    reading = sum(map(store.keep, parts)) / sum(map(store.size, parts))
    latency = replay.latency(tokens)
    with torch.inference_mode():
        recording, seconds = replay.record(batch.input_ids), []
        original = comparison(OutputHead(replay), recording, recording.entered, batch)
        for _ in range(3):
            began = time.perf_counter()
            original.compare(recording.entered)
            seconds.append(time.perf_counter() - began)
    return TimedPass([s / tokens for s in latency], min(seconds) / tokens, reading)


class Prices:
    """What the energies and stages of one model take: a timed pass, times how many there are."""

    def __init__(self, config: RunConfig) -> None:
        self.config, session = config, Session(config)
        check_by_config(session.source, config, needed=False)
        self.streamed, device = session.streaming, pick_device(config.device)
        trust = config.trust_remote_code
        model, self.store, self.memory = open_model(
            session.source,
            dtype=pick_dtype(session.dtype, device),
            device=device,
            memory_limit=config.memory_limit,
            trust_remote_code=trust,
        )
        replay, text = StreamedReplay(model, self.store, self.memory), text_config(model)
        found = inspect_model(session.source, trust_remote_code=trust)
        self.batch = min(session.tuning.batch_tokens, found.positions or self.memory.total)
        # Drawn at random, so that routers of experts spread the words as they do a text's.
        ids = np.random.default_rng(0).integers(int(text.vocab_size), size=(1, self.batch))
        batch = TokenSet.from_rows(ids.tolist())
        self.timed = time_pass(replay, batch)
        self.n, self.stream = len(replay), replay.bytes_per_token
        self.weights = weight_bytes(session.source, self.store.dtype)
        self.logits = int(text.vocab_size) * self.store.dtype.itemsize
        self.remove = self._removed(found)
        blocks = sum(b.bytes for b in found.stack.blocks)
        self.stored = int(blocks * (1 - self.remove / self.n) + found.other_bytes)
        self.left = self.stored / (blocks + found.other_bytes)
        # What a backward pass keeps of each token: half of what the work of a block may take.
        self.graph = self.n * BLOCK_STREAMS // 2 * self.stream
        self.room = replay.room(batch) if self.streamed else 0

    def _removed(self, found: Inspection) -> int:
        """How many blocks go: of a budget as many as it takes; a fifth where nothing is said."""
        if not self.config.removal:
            return max(1, self.n // 5)
        described = {
            "blocks": [
                {**vars(b), "latency_seconds": seconds}
                for b, seconds in zip(found.stack.blocks, self.timed.latency, strict=True)
            ],
            "legality": [vars(row) for row in found.rows],
            "total_parameters": found.parameters,
            "total_bytes": sum(b.bytes for b in found.stack.blocks) + found.other_bytes,
        }
        last = each_removal(self.config)[-1]
        return Target.of(last.removal, removal_rows(described, last), self.n).size

    def energy(self, name: str) -> dict[str, Any]:
        """One energy, at its own number of samples where the options give none."""
        config = self.config.replace(energy=name, linear=False, effort="")
        samples, n = samples_of(config, name), self.n
        if self.streamed and not getattr(energy_part(config, name), "streams", True):
            return _estimate(name, samples, impossible="needs the whole model in memory")
        if name not in PASSES:
            states = removals(n)
            pairs, effort = self._states(name, states, samples), self.config.effort
            if name == "pairwise":
                return pairs
            # A budget of passes, spent on states that are much like the pairs.
            passes = effort.passes or greedy_price(n, self.remove)
            spent = effort.seconds or pairs["seconds"] * passes * n / (n + tree_nodes(states))
            return _estimate(name, samples, spent, pairs["memory"])
        rows = n if name in KINDS else 1
        # Streamed, blocks run forward once more.
        passes = rows * (PASSES[name] + self.streamed)
        seconds = samples * config.length * passes * self.timed.seconds
        work = self.batch * (self.graph * (1 if rows == 1 else 5) + self.logits)
        # Every block is read on the way forward and on the way back.
        return self._measured(name, samples, seconds, work, 2 * (n + 1))

    def stages(self) -> list[dict[str, Any]]:
        """What comes before and after the energy."""
        c, held, forward = self.config, self._held(), self.timed.seconds
        reading, work = self.timed.reading * self.weights, self.batch * self.logits
        random_states = c.random_states * len(few_samples(c.rank_samples)) / c.rank_samples
        states = (c.states + math.ceil(random_states), self.n)
        order = np.random.default_rng(0).random(states).argsort(1).argsort(1)
        # A checkpoint is read, written, and read again to be proven.
        found = [
            _estimate("load", 0, reading, held),
            self._states("rank", order < self.remove, c.rank_samples),
            _estimate("excise", 0, 3 * reading, held, self.stored),
        ]
        if c.patch != "none":
            passes = _PATCH["linear" if c.heal or self.streamed else c.patch]
            seconds = 3 * reading + passes * c.patch_tokens * forward
            memory = held + 4 * c.patch_tokens * self.stream
            samples = -(-c.patch_tokens // c.length)
            found.append(_estimate("patch", samples, seconds, memory, self.stored))
        if c.heal:
            why = "needs the whole model in memory" if self.streamed else ""
            healing = self.healing()
            if healing is None or why:
                why = why or "as long as its text is; a budget (--heal 10min) says how long"
                found.append(_estimate("heal", 0, impossible=why))
            else:
                trained = _TRAINED * self.left * self.weights / self.store.dtype.itemsize
                memory = held + trained + self.batch * self.graph
                samples = healing["steps"] * healing["batch"]
                found.append(_estimate("heal", samples, healing["seconds"], memory, 2 * trained))
        # The original, the exact cut and what was made of it; memory is that of two new processes.
        seconds = 3 * c.report_samples * c.length * forward + 2 * reading
        found.append(_estimate("evaluate", c.report_samples, seconds, held + 4 * work))
        return found

    def healing(self) -> dict[str, Any] | None:
        """What a budget of healing buys, about; None without one, or where it is all of a text."""
        c, forward = self.config, self.timed.seconds
        tokens, seconds = parse_healing(c.heal)
        # A pass of the original, then forward and back through what stays.
        each = forward * (1 + 3 * self.left)
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

    def _states(self, name: str, states: Any, samples: int) -> dict[str, Any]:
        """The losses of states, which pay for every block of their tree once."""
        count, tokens = len(states), samples * self.config.length
        blocks = (1 + tree_nodes(states) / self.n) * sum(self.timed.latency)
        seconds = tokens * (blocks + (1 + count) * self.timed.once)
        work = self.batch * (self.logits + (BLOCK_STREAMS + self.n + 1) * self.stream)
        return self._measured(name, samples, seconds, work, count + 1)

    def _held(self) -> float:
        """Bytes of the process with the weights that it holds."""
        return self.memory.used + (2 * self.store.largest if self.streamed else self.weights)

    def _measured(
        self, name: str, samples: int, seconds: float, work: float, streams: int
    ) -> dict[str, Any]:
        """A measurement, in memory or streamed.

        Args:
            seconds: of computing.
            work: bytes beside the weights.
            streams: hidden states that are kept of each token where the model is streamed.
        """
        if not self.streamed:
            return _estimate(name, samples, seconds, self._held() + work)
        # Reading hides behind computing where enough streams fit; else the disk sets the pace.
        reading = self.timed.reading * self.weights
        sweeps = math.ceil(samples * self.config.length * streams * self.stream / self.room)
        return _estimate(name, samples, max(seconds, sweeps * reading) + reading, self.memory.total)


def _estimate(
    name: str,
    samples: int,
    seconds: float = 0.0,
    memory: float = 0,
    disk: float = 0,
    impossible: str = "",
) -> dict[str, Any]:
    """One line of a plan: bytes, and the seconds with the range that they should lie in."""
    found = {"name": name, "samples": samples, "impossible": impossible}
    found |= {"seconds": seconds, "low": seconds / DOUBT, "high": seconds * DOUBT}
    return found | {"memory": int(memory), "disk": int(disk)}


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Time a pass of a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` where the stages after the energy are of interest.

    Returns:
        what `plan --json` prints: ``weights`` and ``allowed`` in bytes of memory, ``forward`` in
        tokens per second, ``reading`` in bytes per second, ``energies`` and ``stages``,
        ``healing``, what its budget buys, or None, and ``seconds`` of the whole run that
        ``command`` starts.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    began = time.perf_counter()
    prices = Prices(config)
    energies, stages = [prices.energy(name) for name in ENERGIES], prices.stages()
    seconds, rest = {e["name"]: e["seconds"] for e in energies}, sum(s["seconds"] for s in stages)
    recommended, effort, why = advise(config, seconds, rest)
    return {
        "model": config.model,
        "blocks": prices.n,
        "remove": prices.remove,
        "device": str(prices.store.device),
        "dtype": str(prices.store.dtype).removeprefix("torch."),
        "weights": prices.weights,
        "allowed": prices.memory.total,
        "streamed": prices.streamed,
        "forward": 1 / prices.timed.seconds,
        "reading": 1 / max(1e-15, prices.timed.reading),
        "energies": energies,
        "stages": stages,
        "healing": prices.healing(),
        "recommended": recommended,
        "seconds": seconds[recommended] + rest,
        "why": why,
        "command": command(config, recommended, effort),
        "probe_seconds": time.perf_counter() - began,
    }


def advise(config: RunConfig, seconds: Mapping[str, float], rest: float) -> tuple[str, str, str]:
    """The energy that ranks best among those that end in an evening, its effort, and why.

    Args:
        config: what the user asked for.
        seconds: of each energy.
        rest: seconds of all other stages.
    """
    room = EVENING * 3600 - rest
    if config.removal and seconds["refined"] <= room:
        return "refined", config.effort, "it ranks best near one removal, and ends in an evening"
    if seconds["pairwise"] <= room:
        return "pairwise", "", "it is measured, answers every removal, and ends in an evening"
    if config.removal and _LEAST * seconds["refined"] <= room:
        why = "the whole search takes more than an evening; this is as much of it as fits"
        return "refined", f"{max(1, int(room / 3600))}h", why
    why = "measured energies take more than an evening here; this one is a guide only: "
    return "fisher", "", why + "look at its fidelity in the report"


def command(config: RunConfig, energy: str, effort: str = "") -> str:
    """What to type for an energy, with the options that were asked for."""
    words = ["isingcut", "run" if config.removal else "energy", config.model]
    own = {"model", "energy", "effort", "out"}
    if not config.removal:
        own |= {"states", "random_states"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in own:
            flag = f"--{field.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    words += ["--energy", energy, *(["--effort", effort] if effort else [])]
    name = Path(config.model).name.removesuffix(".gguf") or "model"
    return shlex.join([*words, "--out", f"{name}-run"])
