"""Estimate the time of a default run and a healing on GPUs; nothing here runs on a GPU.

    python benchmarks/projection.py [8B] [70B] [400B-MoE]

Counts come from a real default search of a tiny Llama with as many blocks, streamed, on samples of
8 tokens: block calls, their tokens, heads, sweeps over the weights, and seconds of this machine's
processor. Tokens are scaled to samples of 256. The sweeps of the other stages are those of a
streamed default run of a tiny Llama of 12 blocks. Parameters come from the large model's
configuration, card rates from `isingcut plan`: data sheets, of which arithmetic reaches 40 %.

The time of a stage is the maximum of its arithmetic, its reads from the card's memory, its
launches, PCIe and disk, plus its float64 fits and rank 0's own work. The largest of all these is
printed as its bound. The cards of one process take turns. Rank 0 alone cuts, patches and evaluates.
Processes of one node read each part from its disk once. Prints the arithmetic, then a table,
which docs/gpu.md shows in part.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from isingcut.console.progress import duration
from isingcut.data.tokens import TokenSet
from isingcut.energies.search import Search, Target
from isingcut.healing.patch.files import runs
from isingcut.measure.losses import tree_nodes
from isingcut.measure.work import Work
from isingcut.models.inspect import inspect_model
from isingcut.models.replay import BLOCK_STREAMS, Recording
from isingcut.models.streaming.replay import StreamedReplay, open_model
from isingcut.options.config import RunConfig
from isingcut.runs.plan import CARDS, REACHED
from isingcut.testing.tiny import tiny_checkpoint


def shape(hidden: int, inner: int, blocks: int, heads: int, **more: Any) -> dict[str, Any]:
    """Return the configuration of a Llama."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
    rest = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
    return {**rest, **sizes, "num_attention_heads": heads, **more}


# Llama-3.1-8B, Llama-3.3-70B and Llama-4-Maverick.
MODELS = {
    "8B": shape(4096, 14336, 32, 32),
    "70B": shape(8192, 28672, 80, 64),
    "400B-MoE": shape(
        hidden=5120,
        inner=8192,
        blocks=48,
        heads=40,
        model_type="llama4_text",
        vocab_size=202048,
        interleave_moe_layer_step=2,
        num_local_experts=128,
    ),
}
# By machine: card of `isingcut plan`, cards per node, nodes.
MACHINES = {
    "1 x 24 GB": ("rtx4090", 1, 1),
    "1 x 80 GB": ("h100", 1, 1),
    "8 x 80 GB": ("h100", 8, 1),
    "4 nodes of 8 x 80 GB": ("h100", 8, 4),
}
PCIE, NVME, HOST = 25e9, 5e9, {1: 64e9, 8: 1e12}
"""Bytes per second from host memory to each card and from the disk of a node; bytes of host memory
that cache read weights, by cards per node."""
LAUNCHES, FLOAT64 = 3e-4, {"rtx4090": 1.3e12, "h100": 67e12}
"""Host seconds per call of a block; float64 operations per second from the data sheets."""
USABLE, MOST = 0.8, 0.95
"""Shares of a card: default of --memory-limit, and maximum if two large blocks need more."""
SHORT, SAMPLES, BATCH, MILLION = 8, 16, 4096, 10**6
TRAINED, LORA = 16, 0.005
"""Bytes per trained parameter (float32 weight, gradient, two moments); share that LoRA trains."""
SWEEPS = {"rank": 2.0, "cut": 8.1, "patch": 9.1, "evaluate": 4.4}
"""Sweeps over the weights by stage, mostly of the proofs, which generate eight tokens."""
RUN = RunConfig(model="m", remove="1")


def count(n: int, removed: int) -> dict[str, float]:
    """Run the default search on a tiny Llama of n blocks and return its counts."""
    calls: list[int] = []
    run = Recording.block

    def block(recording: Recording, i: int, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.shape[:-1].numel())
        return run(recording, i, hidden)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Recording, "block", block):
        tiny_checkpoint("llama", Path(folder), num_hidden_layers=n)
        opened = open_model(Path(folder), dtype=torch.float32, device=torch.device("cpu"))
        replay = StreamedReplay(*opened)
        ids = np.random.default_rng(0).integers(8, 256, (SAMPLES, SHORT))
        began, before = time.process_time(), replay.store.count_sweeps()
        text = TokenSet.from_rows(ids.tolist())
        found = Search(replay, text, Work(), [Target.count(n, removed)]).run()
    return {
        "passes": sum(calls) / (n * SAMPLES * SHORT),
        "heads": found.evaluator.ledger.heads,
        "sweeps": replay.store.count_sweeps() - before,
        "tokens of a call": RUN.length * sum(calls) / (len(calls) * SHORT),
        "host": time.process_time() - began,
        "cuts": len(runs(found.best(removed))),
    }


@dataclass(frozen=True)
class Stage:
    """The work of one stage.

    Attributes:
        tokens: tokens of the text, each with so many ``passes`` and ``heads``.
        sweeps: reads of all weights, if they are streamed.
        files: bytes of checkpoints written and read.
        memory: bytes per card in addition to the weights.
        at_a_time: tokens of one call of a block.
        float64: operations of the least-squares fits.
        needs: where all weights must fit: "cards" of a process together, each "card", or empty.
    """

    name: str
    tokens: float
    passes: float
    heads: float
    memory: float
    sweeps: float = 0.0
    files: float = 0.0
    at_a_time: float = BATCH
    float64: float = 0.0
    alone: bool = False
    host: float = 0.0
    needs: str = ""


class Projection:
    """Projection of one model; `machine` prints the arithmetic and returns cells of a table row."""

    def __init__(self, config: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            found = inspect_model(Path(folder))
        self.n, self.head = len(found.stack), config["vocab_size"] * config["hidden_size"]
        self.width, self.inner = config["hidden_size"], config["intermediate_size"]
        self.removed, self.stream = self.n // 4, 2 * self.width
        self.active = sum(b.active_parameters for b in found.stack.blocks)
        self.parameters, self.whole = found.parameters, 2 * found.parameters
        self.blocks = 2 * sum(b.parameters for b in found.stack.blocks)
        self.largest = 2 * max(self.head, *(b.parameters for b in found.stack.blocks))
        self.counts = count(self.n, self.removed)
        print(f"\n{self.removed} of {self.n} blocks are removed; measured counts of a search:")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in self.counts.items()))

    def stages(self, processes: int, each: int, *, streamed: bool) -> list[Stage]:
        """Return the stages of a run, and healings of a million tokens."""
        left, logits = 1 - self.removed / self.n, 2 * BATCH * self.head / self.width
        branches = BATCH * self.stream * (self.n + 1 + BLOCK_STREAMS) / each
        ranked = RUN.states + RUN.random_states // 4
        order = np.random.default_rng(0).random((ranked, self.n)).argsort(1).argsort(1)
        nodes = 1 + tree_nodes(order < self.removed) / self.n
        passes, heads, sweeps, together, host, cuts = self.counts.values()
        few = (SAMPLES, RUN.rank_samples, 2 * RUN.report_samples)
        (search, rank, text), patch = (k * RUN.length for k in few), RUN.patch_tokens
        entered = BATCH * self.stream * self.n * left / each + 3 * logits
        lora = TRAINED * LORA * self.parameters / each
        full = TRAINED * left * self.parameters / (processes * each)
        fits, kept = 3 if streamed else 8, 4 * patch * self.stream / each
        # Moments of the inputs of a layer, and a solution for each of five strengths.
        d, f = self.width, self.inner
        fit = cuts * (2 * patch * f * (f + d) + 5 * (f**3 / 3 + 3 * d * f**2))
        # A cut and its patch are written, and read again.
        once: dict[str, Any] = {"alone": True, "files": 2 * left * self.whole}
        return [
            Stage("search", search, passes, heads, branches, sweeps, 0, together, host=host),
            Stage("rank", rank, nodes, 1 + ranked, branches, SWEEPS["rank"]),
            Stage("cut", 48, 4, 4, branches, SWEEPS["cut"], **once),
            Stage("patch", patch, fits, 0, kept, SWEEPS["patch"], float64=fit, **once),
            Stage("evaluate", text, 3, 3, 4 * logits, SWEEPS["evaluate"], alone=True),
            # Teacher forward; student forward, recomputed, and backward once or twice.
            Stage("LoRA", MILLION, 1 + 3 * left, 4, entered + lora, needs="cards"),
            Stage("full", MILLION, 1 + 4 * left, 5, entered + full, needs="card"),
        ]

    def machine(self, name: str) -> list[str]:
        """Print the arithmetic on one machine and return the cells of its table row."""
        card, cards, nodes = MACHINES[name]
        memory, peak, bandwidth = CARDS[card]
        fit = [g for g in (1, 2, 4, 8) if g <= cards and self.whole <= g * USABLE * memory]
        streamed, each = not fit, fit[0] if fit else 1
        kind = "streamed" if streamed else "resident" if each == 1 else f"on {each} cards"
        if wide := streamed and 2 * self.largest > USABLE * memory:
            kind += f", --memory-limit {MOST:.0%}"
        most, processes = (MOST if wide else USABLE) * memory, cards * nodes // each
        print(f"\n{name}: weights {self.whole / 1e9:.0f} GB, {most / 1e9:.0f} GB a card")
        if streamed and 2 * self.largest > most:
            return [f"no: two blocks have {2 * self.largest / 1e9:.0f} GB"]
        print(f"  {kind}: {processes} processes")
        cached = self.whole <= HOST[cards]
        total, cells = self.whole / NVME, [f"{kind}; {processes} x {each}"]
        for stage in self.stages(processes, each, streamed=streamed):
            workers = 1 if stage.alone else processes
            weights = 2 * self.largest if streamed else self.whole / each
            needed = (self.whole if stage.needs == "card" else weights) + stage.memory
            if stage.needs and (needed > memory or (stage.needs == "cards" and streamed)):
                print(f"  {stage.name:<9}no: {stage.needs}, {needed / 1e9:.0f} GB a card")
                cells.append("no")
                continue
            flops = 2 * stage.tokens * (stage.passes * self.active + stage.heads * self.head)
            calls = stage.tokens * stage.passes / stage.at_a_time
            read = stage.sweeps * self.whole * streamed
            seconds = {
                "arithmetic": flops / (REACHED * peak * workers),
                "card memory": calls * self.blocks / (bandwidth * workers),
                "launches": calls * self.n * LAUNCHES / workers,
                "PCIe": read * cached / PCIE,
                "disk": (stage.files + read * (not cached)) / NVME,
            }
            after = {"float64": stage.float64 / (REACHED * FLOAT64[card]), "host": stage.host}
            taken, seconds = max(seconds.values()) + sum(after.values()), seconds | after
            total += taken * (stage.needs == "")
            moved = stage.files + (read if streamed else calls * self.blocks)
            print(
                f"  {stage.name:<9}2 x {stage.tokens:.0f} tokens x ({stage.passes:.1f} passes x "
                f"{self.active / 1e9:.1f}G + {stage.heads:.0f} heads x {self.head / 1e9:.2f}G) = "
                f"{flops / 1e15:.2f} PFLOP; {moved / 1e12:.2f} TB moved; "
                f"{min(needed, memory) / 1e9:.0f} GB a card; "
                + ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items() if value)
            )
            cells.append(f"{duration(taken)}, {max(seconds, key=lambda key: seconds[key])}")
        print(f"  load {self.whole / 1e9:.0f} GB at {NVME / 1e9:.0f} GB/s; a run {total:.0f} s")
        return [*cells[:6], duration(total), *cells[6:]]


def main() -> None:
    """Print the arithmetic, and the table."""
    head = ["model", "machine", "weights; processes x cards", "search", "rank", "cut", "patch"]
    rows = [[*head, "evaluate", "a run", "LoRA", "full"], ["---"] * 11]
    names = sys.argv[1:] or [*MODELS]
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    for name in names:
        print(f"\n# {name}", end="")
        model = Projection(MODELS[name])
        rows += [[name, machine, *model.machine(machine)] for machine in MACHINES]
    print("\n" + "\n".join("| " + " | ".join([*r, *[""] * (11 - len(r))]) + " |" for r in rows))


if __name__ == "__main__":
    main()
