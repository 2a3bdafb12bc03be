"""`isingcut plan`: what each energy would take on this machine, before anything runs.

A few of the model's own blocks are timed (`probe.py`); `costs.py` counts how often a run needs
what. Nothing is loaded but these blocks, the embedding and the head, and nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from isingcut.energies.search import Target
from isingcut.options.config import RunConfig
from isingcut.options.spellings import parse_effort
from isingcut.runs import costs
from isingcut.runs.advice import advise
from isingcut.runs.costs import Cost, Shape
from isingcut.runs.measuring import energy_part, samples_of
from isingcut.runs.removal import check_by_config, each_removal, removal_rows

if TYPE_CHECKING:
    from isingcut.runs.probe import Timings

ENERGIES = ("empirical-fisher", "fisher", "gauss-newton", "hessian", "pairwise", "refined")
# How far off each kind of estimate may be, beside the noise of its timings: from comparisons with
# real runs (docs/big_models.md).
_DOUBT = {
    "gauss-newton": 1.5,
    "hessian": 1.5,
    "refined": 1.5,
    "load": 2.0,
    "excise": 2.0,
    "evaluate": 1.5,
}
_DOUBT_ELSE = 1.25
_DOUBT_STREAMED = 1.3
# Tokens of the sequence that a run measures the latency of its blocks on.
_SEQUENCE = 128


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


@dataclass(frozen=True)
class Plan:
    """Estimates for one model on this machine.

    Attributes:
        model: as it was called.
        blocks: N.
        remove: blocks that go, for the stages after the energy.
        device, dtype: of the run.
        weights: bytes of the model in memory.
        allowed: bytes the process may take.
        streamed: whether blocks would be read from disk one after the other.
        forward: tokens per second of the model's blocks and head.
        reading: bytes per second of weights, from disk into memory.
        energies, stages: estimates.
        recommended: an energy, and ``why``.
        command: what to type.
        probe_seconds: what this took.
    """

    model: str
    blocks: int
    remove: int
    device: str
    dtype: str
    weights: int
    allowed: int
    streamed: bool
    forward: float
    reading: float
    energies: tuple[Estimate, ...]
    stages: tuple[Estimate, ...]
    recommended: str
    why: str
    command: str
    probe_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def total(self, energy: str) -> float:
        """Seconds of a whole run with an energy."""
        own = next(e for e in self.energies if e.name == energy)
        return own.seconds + sum(s.seconds for s in self.stages)


def make_plan(config: RunConfig, *, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """Probe a model and estimate every energy at its default samples.

    Args:
        config: `model`; `remove` or `budget` where the stages after the energy are of interest.
        clock: seconds, for the probe.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    import psutil

    from isingcut.models.architectures import find_stack
    from isingcut.models.device import pick_device, pick_dtype
    from isingcut.models.sources import resolve
    from isingcut.models.streaming.replay import open_model
    from isingcut.runs.probe import probe

    # What every process needs before it can begin.
    startup = max(1.0, time.time() - psutil.Process().create_time())
    began = time.perf_counter()
    trust = config.trust_remote_code
    folder = resolve(config.model, trust_remote_code=trust)
    check_by_config(folder, config, needed=False)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, store, memory = open_model(
        folder,
        dtype=dtype,
        device=device,
        memory_limit=config.memory_limit,
        trust_remote_code=trust,
    )
    stack = find_stack(model)
    n = len(stack)
    shape = _shape(config, folder, model, store, memory.used, memory.total)
    asked = None if config.attention == "auto" else config.attention
    t = probe(
        model,
        store,
        config.length,
        shape.batch_tokens,
        attention=asked,
        twice=not shape.streamed,
        clock=clock,
    )
    remove = _removal(config, model, shape, t)
    energies = tuple(_energy(config, name, shape, t, remove) for name in ENERGIES)
    kept = [i for i in range(n) if i not in {(7 * k) % n for k in range(remove)}]
    states = costs.random_states(n, remove, config.states + config.random_states)
    stages = (
        _estimate("load", 0, costs.loaded(shape, t), shape, t, startup),
        _estimate(
            "rank",
            config.rank_samples,
            costs.measured(shape, t, states, config.rank_samples),
            shape,
            t,
        ),
        _estimate("excise", 0, costs.excised(shape, t, kept), shape, t),
        _estimate(
            "evaluate",
            config.report_samples,
            costs.evaluated(shape, t, kept, config.report_samples, startup),
            shape,
            t,
        ),
    )
    advice = advise(config, {e.name: e.seconds for e in energies}, sum(s.seconds for s in stages))
    return Plan(
        model=config.model,
        blocks=n,
        remove=remove,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weights=shape.weights,
        allowed=shape.allowed,
        streamed=shape.streamed,
        forward=1 / (sum(t.blocks) + t.entering + t.comparing),
        reading=1 / max(1e-15, t.reading),
        energies=energies,
        stages=stages,
        recommended=advice.energy,
        why=advice.why,
        command=advice.command,
        probe_seconds=time.perf_counter() - began,
    )


def _removal(config: RunConfig, model: Any, shape: Shape, t: Timings) -> int:
    """How many blocks go, for the costs; a fifth where nothing is said.

    Of a budget, as many as about average blocks take (`Target.size`).
    """
    from isingcut.models.architectures import find_stack, legality

    stack = find_stack(model)
    if not config.removal:
        return max(1, len(stack) // 5)
    blocks = {
        "blocks": [
            {**vars(b), "latency_seconds": _SEQUENCE * seconds, "bytes": size}
            for b, seconds, size in zip(stack.blocks, t.blocks, shape.parts, strict=True)
        ],
        "legality": [vars(row) for row in legality(model.config, stack)],
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "total_bytes": shape.weights,
    }
    last = each_removal(config)[-1]
    return Target.of(last.removal, removal_rows(blocks, last), len(stack)).size


def _shape(
    config: RunConfig, folder: Any, model: Any, store: Any, process: int, allowed: int
) -> Shape:
    from isingcut.models.architectures import find_stack, text_config
    from isingcut.models.compute.tuning import BATCH_TOKENS
    from isingcut.models.inspect import inspect_model
    from isingcut.models.streaming.memory import weight_bytes
    from isingcut.models.streaming.plan import EMBED, HEAD

    n = len(find_stack(model))
    decoder = text_config(model)
    found = inspect_model(folder, trust_remote_code=config.trust_remote_code)
    stored = tuple(b.bytes for b in found.stack.blocks)
    parts = tuple(store.size(i) for i in range(n))
    tied = store.like(EMBED) == store.like(HEAD) and bool(decoder.tie_word_embeddings)
    outside = store.resident + store.size(EMBED) + (0 if tied else store.size(HEAD))
    streamed = config.stream == "on"
    if config.stream == "auto":
        streamed = weight_bytes(folder, store.dtype) > allowed - process
    return Shape(
        blocks=n,
        parts=parts,
        outside=outside,
        largest=store.largest,
        stored=sum(stored) + found.other_bytes,
        stored_blocks=stored,
        stream=int(decoder.hidden_size) * store.dtype.itemsize,
        word=store.dtype.itemsize,
        vocabulary=int(decoder.vocab_size),
        process=process,
        allowed=allowed,
        streamed=streamed,
        length=config.length,
        batch_tokens=config.batch_tokens or BATCH_TOKENS,
    )


def _energy(config: RunConfig, name: str, shape: Shape, t: Timings, remove: int) -> Estimate:
    samples = samples_of(config.replace(energy=name, linear=False, effort=""), name)
    if name in ("gauss-newton", "hessian"):
        if shape.streamed and not getattr(energy_part(RunConfig(energy=name), name), "streams", 1):
            return Estimate(name, samples, impossible="needs the whole model in memory")
        if name not in t.curvature:
            return Estimate(name, samples, impossible="a double backward pass failed")
        cost = costs.second_derivatives(shape, t, name, samples)
    elif name in ("empirical-fisher", "fisher"):
        cost = costs.first_derivatives(shape, t, samples)
    elif name == "pairwise":
        cost = costs.measured(shape, t, costs.pairs(shape.blocks), samples)
    else:
        cost = _search(config, shape, t, remove, samples)
    return _estimate(name, samples, cost, shape, t)


def _search(config: RunConfig, shape: Shape, t: Timings, remove: int, samples: int) -> Cost:
    from isingcut.energies.search import greedy_price

    amount, minutes = parse_effort(config.effort)
    one = costs.searched(shape, t, 1.0, samples)
    if minutes:
        assert amount is not None
        return Cost(60 * amount, one.memory, int(60 * amount / one.seconds * one.disk))
    return costs.searched(shape, t, amount or greedy_price(shape.blocks, remove), samples)


def _estimate(
    name: str, samples: int, cost: Cost, shape: Shape, t: Timings, more: float = 0.0
) -> Estimate:
    # The probe's fastest rounds stand for a quiet machine; what else runs only ever slows down.
    quiet = cost.seconds + more
    doubt = _DOUBT.get(name, _DOUBT_ELSE) * (_DOUBT_STREAMED if shape.streamed else 1.0)
    return Estimate(
        name,
        samples,
        seconds=quiet * math.sqrt(t.noise),
        low=quiet / doubt,
        high=quiet * t.noise * doubt,
        memory=cost.memory,
        disk=cost.disk,
    )
