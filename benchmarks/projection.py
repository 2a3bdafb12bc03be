"""Estimate the time of a default run and a healing on GPUs, as ranges; nothing here was measured.

    python benchmarks/projection.py [8B] [70B] [400B-MoE] [--removed 0.4]

Every part of a stage has a count, and a rate with a fast and a slow end. Counts follow the code:
its constants, its formulas, and a real default search of a tiny Llama with as many blocks, on
samples of 8 tokens, scaled to samples of 256. The sweeps over the weights of a streamed model are
those of a streamed default run of a tiny Llama of 12 blocks. Parameters come from the large model's
configuration. Nothing overlaps, but for arithmetic, launches and reads of weights of the same
calls: there the longest counts. Processes share the search and the ranking of states; rank 0 alone
does everything else. A written checkpoint is hashed at its edges only (2 MiB a file), which takes
no time.

Prints each part of each stage, then a table, which docs/gpu.md shows in part.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from isingcut.console.progress import duration
from isingcut.data.tokens import TokenSet
from isingcut.energies.refined import KEPT
from isingcut.energies.search import Search, Target
from isingcut.evaluation import prompts
from isingcut.evaluation.speed import speed
from isingcut.healing.patch.files import runs
from isingcut.healing.patch.ridge import bytes_of
from isingcut.healing.repairs.tuned import BYTES, HELD_OUT_EVERY, STEP_TOKENS
from isingcut.measure.losses import tree_nodes
from isingcut.measure.work import Work
from isingcut.models import verify
from isingcut.models.inspect import inspect_model
from isingcut.models.replay import BLOCK_STREAMS, Recording
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.models.streaming.store import Store
from isingcut.options.config import RunConfig
from isingcut.options.heal import LENGTH, HealConfig
from isingcut.runs.solving import SECONDS
from isingcut.runs.trials import MORE, TOKENS, TRIED, is_deep, is_searched, trial_tokens
from isingcut.testing.tiny import tiny_checkpoint

NOTE = "not measured: no card was available"
A_RUN = "a run, not measured"
COLUMNS = ["load", "search", "rank", "cut", "patch", "evaluate", A_RUN, "LoRA", "full"]


def shape(
    hidden: int, inner: int, blocks: int, heads: int, **more: Any
) -> dict[str, Any]:
    """Return the configuration of a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        **more,
    }


# Llama-3.1-8B, Llama-3.3-70B and Llama-4-Maverick.
MODELS = {
    "8B": shape(4096, 14336, 32, 32),
    "70B": shape(8192, 28672, 80, 64),
    "400B-MoE": shape(
        5120,
        8192,
        48,
        40,
        model_type="llama4_text",
        vocab_size=202048,
        interleave_moe_layer_step=2,
        num_local_experts=128,
    ),
}
CARDS = {"rtx4090": (24e9, 165e12, 1.0e12), "h100": (80e9, 989e12, 3.35e12)}
"""Data sheets: bytes of memory, dense bfloat16 operations and bytes of that memory per second."""
# By machine: card, cards per node, nodes.
MACHINES = {
    "1 x 24 GB": ("rtx4090", 1, 1),
    "1 x 80 GB": ("h100", 1, 1),
    "8 x 80 GB": ("h100", 8, 1),
    "4 nodes of 8 x 80 GB": ("h100", 8, 4),
}
Range = NDArray[np.float64]
"""Two numbers, of the shortest and the longest time."""


def rates(fast: float, slow: float) -> Range:
    """Return the fast and the slow end of a rate."""
    return np.array([fast, slow], dtype=float)


FEW = rates(0.55, 0.3)
MANY = rates(0.6, 0.35)
BACK = rates(0.5, 0.3)
HEAD = rates(0.75, 0.5)
"""Share of the data sheet's bfloat16 arithmetic: blocks in calls of some 500 tokens, of thousands,
with gradients, and the output head. The best product reaches 0.80 on an H100 (MAMF table of
stas00/ml-engineering), layers 0.30 to 0.63 on an RTX 4090 (qhduan/transformers-benchmarks)."""
FLOPS = {
    "float32": {"rtx4090": 82.6e12, "h100": 67e12},
    "float64": {"rtx4090": 1.3e12, "h100": 67e12},
}
SHARE = rates(0.8, 0.3)
"""Operations per second without TF32, from the data sheets, and the share that products and a
Cholesky factorisation reach."""
BANDWIDTH = rates(0.9, 0.6)
LOGIT = 96
"""Share of the data sheet's memory bandwidth, of which a copy reaches 0.9; bytes moved per logit by
the elementwise operations of `RowSums`, one after another."""
CALLS = rates(5000, 1700)
"""Block calls per second that the host issues: 38 kernels and 36 views each, counted in a Llama, at
some 4 us an operation (measured by others) and twice as much with the modules around them."""
CPU = {"rtx4090": rates(6e11, 2e11), "h100": rates(2e12, 5e11)}
RAM = {"rtx4090": rates(60e9, 30e9), "h100": rates(250e9, 80e9)}
"""Float64 operations and bytes per second of the host, all cores: two memory channels, and eight to
twelve. Assumed."""
HOST = {1: 64e9, 8: 1e12}
"""Bytes of host memory by cards per node."""
PINNED = rates(50e9, 20e9)
UNPINNED = rates(10e9, 2.5e9)
LINKS = {1: 2e11, 4: 3e10}
"""Bytes per second between host and card from pinned memory (PCIe 5 and 4) and from unpinned memory
(5e9 on PCIe 3, pytorch#16901; 1.4e9 into new memory, pytorch#138018); between cards, by nodes."""
DISK = rates(6e9, 2e9)
"""Bytes per second from NVMe or the page cache; the slow end is that of `isingcut run`."""
IMPORTS = rates(1 / 5, 1 / 15)
TEXT = rates(1.0, 0.3)
"""Starts of Python with torch and transformers, and readings of a patch's text, per second; one
core of this project's machine takes 7 and 0.8 seconds."""
USABLE = 0.8
MOST = 0.95
"""Shares of a card: default of --memory-limit, and maximum if two large blocks need more."""
SHORT = 8
SAMPLES = 16
BATCH = 4096
MILLION = 10**6
STEPS = 61
"""STEPS of 16 samples of 1,024 tokens are a million tokens."""
SOLVES = 6
"""Solutions per fit: three ridge strengths, two steps to the best, and that one on all rows."""
ADAM = 88
"""Bytes of memory traffic per parameter and step of AdamW, one tensor at a time (72), and of casts
and copies to and from the layers in use."""
TRAINED = 16
LORA = 0.005
"""Bytes per trained parameter (float32 weight, gradient, two moments); share that LoRA trains."""
SWEEPS = {"rank": 2.0, "proof": 8.1, "evaluate": 4.4}
"""Sweeps over the weights of a streamed model; a proof generates eight tokens."""
RUN = RunConfig(model="m", remove="1")


@dataclass(frozen=True)
class Term:
    """A count of work and the rate of it, in units per second."""

    name: str
    count: float
    unit: str
    rate: Range


Part = tuple[Term, ...]
"""Terms that run at the same time."""
Cells = dict[str, str]
"""Cells of a table by machine."""


def defaults(function: Any) -> Any:
    """Return the defaults of keyword-only arguments, by name."""
    return inspect.unwrap(function).__kwdefaults__


def seconds(part: Part) -> Range:
    """Return the shortest and the longest time of a part."""
    return np.asarray(np.max([term.count / term.rate for term in part], axis=0))


@dataclass(frozen=True)
class Counts:
    """What a search did: passes and heads over its text, sweeps over the weights, tokens of a block
    call, seconds of its own work on one core, and the removed blocks of its best state."""

    passes: float
    heads: float
    sweeps: float
    together: float
    host: float
    removed: tuple[int, ...]


def count(n: int, removed: int) -> Counts:
    """Run the default search on a tiny Llama of n blocks and return its counts."""
    calls = list[int]()
    inside = list[float]()
    run = Recording.block

    def block(recording: Recording, i: int, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.shape[:-1].numel())
        began = time.process_time()
        after = run(recording, i, hidden)
        inside.append(time.process_time() - began)
        return after

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Recording, "block", block),
    ):
        source = tiny_checkpoint("llama", Path(folder), num_hidden_layers=n)
        store = Store(source, torch.float32, torch.device("cpu"))
        replay = StreamedReplay(store)
        ids = np.random.default_rng(0).integers(8, 256, (SAMPLES, SHORT))
        began = time.process_time()
        before = replay.store.count_sweeps()
        text = TokenSet.from_rows(ids.tolist())
        found = Search(replay, text, Work(), [Target.count(n, removed)]).run()
    return Counts(
        passes=sum(calls) / (n * SAMPLES * SHORT),
        heads=found.evaluator.ledger.heads,
        sweeps=replay.store.count_sweeps() - before,
        together=RUN.length * sum(calls) / (len(calls) * SHORT),
        host=time.process_time() - began - sum(inside),
        removed=found.goals[0].removed,
    )


class Model:
    """The sizes of a model in parameters and bytes, and the counts of a search in it."""

    def __init__(self, config: dict[str, Any], share: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            found = inspect_model(Path(folder))
        sizes = [b.parameters for b in found.stack.blocks]
        self.n = len(sizes)
        self.width = config["hidden_size"]
        self.inner = config["intermediate_size"]
        self.vocabulary = config["vocab_size"]
        self.stream = 2 * self.width
        self.head = self.vocabulary * self.width
        # Active parameters: Llama 4 in transformers computes every expert for every token.
        self.active = sum(sizes)
        self.whole = 2 * found.parameters
        self.largest, self.removed = 2 * max(self.head, *sizes), round(share * self.n)
        self.left, self.counts = 1 - self.removed / self.n, count(self.n, self.removed)
        self.cuts = runs(self.counts.removed)
        near = {b for a, z in self.cuts for b in (a - 1, z + 1)} & {*range(self.n)}
        self.tuned = len(near - {*self.counts.removed}) * self.active / self.n


class Setting:
    """A model on a machine: where its weights are, and the parts of its stages.

    Attributes:
        kind: where the weights are; "no: ..." if the model does not fit.
        room: bytes of a card beside the weights.
    """

    def __init__(self, model: Model, machine: str) -> None:
        self.model = model
        self.card, cards, self.nodes = MACHINES[machine]
        self.memory, self.peak, bandwidth = CARDS[self.card]
        self.bandwidth = BANDWIDTH * bandwidth
        self.ram = RAM[self.card]
        self.host = HOST[cards]
        needed = model.whole / (USABLE * self.memory)
        fit = [g for g in (1, 2, 4, 8) if needed <= g <= cards]
        self.streamed = not fit
        self.each = fit[0] if fit else 1
        self.kind = "streamed" if self.streamed else "resident"
        if self.each > 1:
            self.kind = f"on {self.each} cards"
        if wide := self.streamed and 2 * model.largest > USABLE * self.memory:
            self.kind += f", --memory-limit {MOST:.0%}"
        self.processes = cards * self.nodes // self.each
        most = MOST if wide else USABLE
        self.weights = 2 * model.largest if self.streamed else model.whole / self.each
        self.room = most * self.memory - self.weights
        if self.room < 0:
            self.kind = f"no: two blocks have {self.weights / 1e9:.0f} GB"

    def move(self, name: str, size: float, rate: Range) -> Part:
        """Make the part that moves bytes."""
        return (Term(name, size / 1e9, "GB", rate / 1e9),)

    def read(self, sweeps: float) -> Part:
        """Make the part that reads the weights of a streamed model: one thread, disk, then PCIe."""
        rate = PINNED if self.model.whole <= self.host else 1 / (1 / DISK + 1 / PINNED)
        return self.move("weights", sweeps * self.model.whole * self.streamed, rate)

    def blocks(
        self,
        tokens: float,
        passes: float,
        share: Range,
        at_a_time: float = BATCH,
        workers: int = 1,
    ) -> Part:
        """Make the part that runs the blocks."""
        m = self.model
        calls = max(1.0, tokens / at_a_time) * passes
        rate = share * self.peak / 1e15 * workers
        flops = 2e-15 * tokens * passes * m.active
        return (
            Term("arithmetic", flops, "PFLOP", rate),
            Term("launches", calls * m.n, "calls", CALLS * workers),
            *self.move("memory", 2 * calls * m.active, self.bandwidth * workers),
        )

    def heads(self, tokens: float, heads: float, workers: int = 1) -> list[Part]:
        """Make the parts of the output head and the loss."""
        m = self.model
        rate = HEAD * self.peak / 1e15 * workers
        logits = LOGIT * tokens * heads * m.vocabulary
        product = Term("head", 2e-15 * tokens * heads * m.head, "PFLOP", rate)
        return [(product,), self.move("logits", logits, self.bandwidth * workers)]

    def compute(self, dtype: str, flops: float, place: str) -> Part:
        """Make the part of float32 or float64 arithmetic on the "card" or the "host"."""
        on_card = SHARE * FLOPS[dtype][self.card]
        on_host = CPU[self.card] * (2 if dtype == "float32" else 1)
        rate = on_card if place == "card" else on_host
        return (Term(f"{dtype}, {place}", flops / 1e12, "TFLOP", rate / 1e12),)

    def fit(self, t: float, times: float = 1, known: bool = False) -> list[Part]:
        """Make the parts of least-squares fits; ``known``: without passes of the original."""
        m = self.model
        d = m.width
        f = m.inner
        last = (m.cuts[-1][1] + 1) / m.n
        fits = times * len(m.cuts)
        # With few rows their products are factorised, else the moments of the inputs.
        n = min(t, f)
        sums = (
            1.25 * t * t * f + 2 * t * f * d if t <= f else 2 * t * f * (5 * f / 8 + d)
        )
        solve = n**3 / 3 + 3 * d * n**2
        # Both models are the same up to the first cut.
        passes = (2 - known) * last - (m.removed + m.cuts[0][0]) / m.n
        place = "card" if bytes_of(f, d) <= self.room else "host"
        return [
            (*self.blocks(t, times * passes, MANY), *self.read(times)),
            self.compute("float32", fits * (sums + (SOLVES - 1) * solve), place),
            self.compute("float64", fits * solve, place),
            # The map in float64 is folded into the weight on the host.
            self.move("maps", fits * 8 * d * f, UNPINNED),
            self.move("fold", fits * 64 * d * f, self.ram),
        ]

    def tune(self, tokens: float) -> list[Part]:
        """Make the parts of `tune`, of the layers that fit; none for a streamed model."""
        m = self.model
        train = tokens * (1 - 1 / HELD_OUT_EVERY)
        # Blocks from the first tuned one on; hidden states twice, and the graph of a micro-batch.
        after = m.n - m.cuts[0][0] + 1 - m.removed
        kept = (2 * tokens + STEP_TOKENS * after * BLOCK_STREAMS // 2) * m.stream
        # On the card a layer in use and its gradient, and its optimiser's state if it fits.
        room = self.each * self.room - kept
        tuned = min(m.tuned, room / 4, (USABLE * self.host + room) / BYTES)
        if self.streamed or tuned <= 0:
            return []
        on_card = min(tuned, (room - 4 * tuned) / BYTES)
        steps = train / STEP_TOKENS
        last = m.cuts[-1][1] + 1
        return [
            self.blocks(train, 1 - last / m.n, FEW, STEP_TOKENS),
            self.blocks(tokens - train, 1, FEW, STEP_TOKENS),
            self.blocks(train, 3 * after / m.n, FEW, STEP_TOKENS),
            self.blocks(tokens - train, 2 * after / m.n, FEW, STEP_TOKENS),
            *self.heads(tokens, 3 + 1 / HELD_OUT_EVERY),
            # A gradient and a weight per step.
            self.move("gradients and weights", 4 * steps * (tuned - on_card), PINNED),
            self.move("AdamW, host", ADAM * steps * (tuned - on_card), self.ram),
            self.move("AdamW, card", ADAM * steps * on_card, self.bandwidth),
        ]

    def load(self, size: float, name: str) -> list[Part]:
        """Make the parts that read weights and, unless they are streamed, move them to a card."""
        moved = size * (not self.streamed)
        return [self.move(name, size, DISK), self.move("to the card", moved, UNPINNED)]

    def write(self) -> list[Part]:
        """Make the parts that copy a checkpoint without the cut blocks, and prove it."""
        size = self.model.left * self.model.whole
        # Logits of both models; two prompts are continued, with a cache and without.
        passes = (2 + 2 * 2 * verify.NEW_TOKENS) * self.model.left
        proof = self.blocks(1, passes * (not self.streamed), FEW, 1)
        return [
            self.move("copy", 2 * size, DISK),
            *self.load(size, "read back"),
            proof,
            self.read(SWEEPS["proof"]),
        ]

    def rank(self) -> list[Part]:
        """Make the parts of the ranking, with trial patches and a search in a deep cut."""
        m = self.model
        tokens = RUN.rank_samples * RUN.length
        trial = trial_tokens(RUN)
        # Of the spectrum, of the search, of two one-pass methods, and random ones.
        states = RUN.states + KEPT + 2 + RUN.random_states // 4
        order = np.random.default_rng(0).random((states, m.n)).argsort(1).argsort(1)
        nodes = tree_nodes(order < m.removed)
        tried = TRIED
        ranked = self.blocks(tokens, 1 + nodes / m.n, MANY, workers=self.processes)
        parts = [(*ranked, *self.read(SWEEPS["rank"]))]
        parts += self.heads(tokens, 1 + states, self.processes)
        if is_searched(RUN, m.removed, m.n, streamed=self.streamed):
            searched = m.n + MORE
            # A state shares half of its blocks and fits with those before, and the original.
            parts += self.fit(TOKENS, searched / 2, known=True)
            parts.append(self.blocks(TOKENS, searched / 2 * m.left, FEW))
            parts += self.heads(TOKENS, 1 + searched)
            # The lowest, the best of one pass, and two of the search.
            tried = 4
        parts += tried * is_deep(m.removed, m.n) * self.tune(trial)
        parts += [(Term("text", tried, "readings", TEXT),)]
        parts += self.fit(trial, tried, known=tried > 1)
        measured = self.blocks(tokens, 1 + tried * m.left, MANY)
        return [*parts, (*measured, *self.read(tried)), *self.heads(tokens, 2 * tried)]

    def evaluate(self) -> list[Part]:
        """Make the parts of the evaluation, on the report text and a quarter of it of another."""
        m = self.model
        tokens = 1.25 * RUN.report_samples * RUN.length
        parts = [*self.load(m.left * m.whole, "read back"), *self.heads(tokens, 4)]
        parts.append(self.blocks(tokens, 2 + 2 * m.left, MANY))
        if self.streamed:
            return [*parts, self.read(SWEEPS["evaluate"])]
        # A prefill, a prompt with one token and one with more; one generation; two new processes.
        timed = defaults(speed)
        passes = (timed["repeats"] + 1) * (3 + timed["new_tokens"])
        passes += prompts.NEW_TOKENS
        parts.append(self.blocks(1, (1 + m.left) * passes, FEW, 1))
        return [*parts, start(2), *self.load((1 + m.left) * m.whole, "load again")]

    def heal(self, full: bool) -> list[Part] | None:
        """Make the parts of a healing on a million tokens; None if it does not fit.

        LoRA needs all weights on the cards of each process; full training shards the student's.
        """
        m = self.model
        workers = self.processes
        trained = (m.left if full else LORA) * m.whole / 2
        held = m.whole if full else self.weights
        held += TRAINED * trained / (self.each * (workers if full else 1))
        held += BATCH * (m.stream * m.n * m.left / self.each + 6 * m.vocabulary)
        if held > self.memory or (self.streamed and not full):
            return None
        # Before, after, and every 100,000 tokens.
        checks = 12 * HealConfig().report_samples * LENGTH
        cut = m.left * m.whole
        exchanged = 4 * trained * STEPS * (3 if full else 2) * (workers > 1)
        return [
            start(1),
            self.move("files", m.whole + (7 if full else 5) * cut, DISK),
            # The student is float32, and the last proof is of 18 passes on the host.
            self.move("student, host", (6 + 18) * cut, self.ram),
            self.blocks(
                MILLION, 1 + (4 if full else 3) * m.left, BACK, workers=workers
            ),
            *self.heads(MILLION, 5 if full else 4, workers),
            self.blocks(checks, 1 + m.left, MANY, workers=workers),
            self.move("AdamW, card", ADAM * trained * STEPS, self.bandwidth * workers),
            self.move("exchange", exchanged, rates(1, 0.5) * LINKS[self.nodes]),
        ]

    def stages(self) -> dict[str, list[Part] | None]:
        """Return the parts of each stage of a run, and of two healings."""
        m = self.model
        c = self.model.counts
        tokens = SAMPLES * RUN.length
        searched = self.blocks(tokens, c.passes, FEW, c.together, self.processes)
        # Proven at once up to some 40 blocks (docs/solvers.md).
        solve = Term("solve", SECONDS * (m.n > 40), "s", rates(100, 1))
        fit = RUN.patch_tokens * (1 if self.streamed else 1 - 1 / HELD_OUT_EVERY)
        text = Term("text", 1, "readings", TEXT)
        return {
            "load": [start(1), *self.load(m.whole, "read")],
            "search": [
                (*searched, *self.read(c.sweeps)),
                *self.heads(tokens, c.heads, self.processes),
                (Term("search, host", c.host, "s", rates(2, 1)),),
                (solve,),
            ],
            "rank": self.rank(),
            "cut": self.write(),
            "patch": [
                (text,),
                *self.fit(fit),
                *self.tune(RUN.patch_tokens),
            ],
            "evaluate": self.evaluate(),
            "LoRA": self.heal(full=False),
            "full": self.heal(full=True),
        }


def start(processes: int) -> Part:
    """Make the part that starts processes."""
    return (Term("imports", processes, "starts", IMPORTS),)


def spell(span: Range) -> str:
    """Return a range of seconds in words."""
    low, high = map(duration, span)
    unit = high[high.index(" ") :]
    return high if low == high else f"{low.removesuffix(unit)} to {high}"


def summarise(
    setting: Setting, machine: str, rows: dict[tuple[str, ...], Cells]
) -> list[str]:
    """Return the cells of a machine in the table of stages; add those of the parts to ``rows``."""
    if setting.room < 0:
        return []
    total = rates(0, 0)
    cells = dict[str, str]()
    for stage, found in setting.stages().items():
        taken = sum(map(seconds, found or []), rates(0, 0))
        total += taken * (stage not in ("LoRA", "full"))
        terms = sorted(
            (term for part in found or [] for term in part), key=attrgetter("name")
        )
        longest = dict[str, float]()
        for name, own in groupby(terms, attrgetter("name")):
            same = list(own)
            if counted := sum(term.count for term in same):
                span = sum((term.count / term.rate for term in same), rates(0, 0))
                key = (stage, name, f"{float(f'{counted:.3g}'):,g} {same[0].unit}")
                rows.setdefault(key, {})[machine] = spell(span)
                longest[name] = span[1]
        bound = max(longest, key=longest.__getitem__, default="")
        cells[stage] = "no" if found is None else f"{spell(taken)}, {bound}"
    cells[A_RUN] = spell(total)
    return [f"{setting.processes} x {setting.each}"] + [
        cells[stage] for stage in COLUMNS
    ]


def print_table(rows: list[list[str]]) -> None:
    """Print rows as a Markdown table; the first is its head."""
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("| " + " | ".join([*row, *[""] * (len(rows[0]) - len(row))]) + " |")


def main() -> None:
    """Print the parts of each stage of each model, and the table of stages."""
    parser = argparse.ArgumentParser(description="Estimate the time of a run on GPUs.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument(
        "--removed", type=float, default=0.25, help="share of removed blocks"
    )
    given = parser.parse_args()
    if unknown := [name for name in given.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    table = [["model", "machine", "weights", "processes x cards", *COLUMNS]]
    for name in given.models or MODELS:
        model = Model(MODELS[name], given.removed)
        rows = dict[tuple[str, ...], Cells]()
        print(f"\n{name} without {model.removed} of {model.n} blocks; {NOTE}\n")
        for machine in MACHINES:
            setting = Setting(model, machine)
            table.append(
                [name, machine, setting.kind, *summarise(setting, machine, rows)]
            )
        head = ["stage", "part", "count", *(f"{m}, not measured" for m in MACHINES)]
        keys = sorted(rows, key=lambda key: COLUMNS.index(key[0]))
        lines = ([*key, *(rows[key].get(m, "") for m in MACHINES)] for key in keys)
        print_table([head, *lines])
    print(f"\n{NOTE}\n")
    print_table(table)


if __name__ == "__main__":
    main()
