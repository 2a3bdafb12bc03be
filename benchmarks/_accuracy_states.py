"""What each method of the accuracy benchmark removes, and the sizes of streams at the cuts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from _quality_bench import instructions
from _quality_evolution import within
from isingcut.baselines import registry as baselines
from isingcut.baselines.base import open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.energies.search import Search, Target
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.measure.streams import boundaries
from isingcut.measure.work import Work
from isingcut.models.replay import Recording, Replay

OURS = "isingcut"
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "block-influence": ("block-influence", {}),
    "block-influence-iterative": ("block-influence", {"iterative": True}),
    "angular-window": ("angular-window", {}),
    "norm-ratio": ("norm-ratio", {}),
    "sleb": ("sleb", {}),
}
PAPER = {"cbo": 1, "cbo-top20": 20}
"""How many of the lowest states of the paper's energy are looked at."""
METHODS = ("last", *PUBLISHED, *PAPER, "evopress", OURS)
"""`last`: the last M blocks, whatever they do."""
PASSES = {"sleb": 90.0, "cbo": 0.0, "cbo-top20": 20.0, "evopress": 90.0, OURS: 90.0, "last": 0.0}
"""About what a choice costs, in passes over its text; the others take a few."""


def choose(
    method: str, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
) -> dict[str, Any]:
    """The blocks that a method removes, and what it paid in passes over its text.

    `evopress` may pay what the search of `isingcut` may: the passes of a greedy path.
    """
    n = len(replay)
    if method == "last":
        return {"removed": list(range(n - remove, n)), "passes": 0.0}
    if method == OURS:
        found = Search(replay, tokens, work, [Target.count(n, remove)], seed=seed).run()
        return {"removed": list(found.best(remove)), "passes": found.evaluator.ledger.passes}
    if method == "evopress":
        setting = SimpleNamespace(bench=SimpleNamespace(replay=replay), wide=tokens, scale=1.0)
        greedy = sum((n - s) ** 2 / 2 / n for s in range(remove))
        outcome = within(setting, remove, seed, greedy, work)[1]  # type: ignore[arg-type]
    else:
        name, options = PUBLISHED[method]
        outcome = baselines.get(name)(**options).choose(replay, tokens, remove, work, seed)
    return {"removed": sorted(map(int, outcome.removed)), "passes": outcome.passes}


def paper_energy(replay: Replay, tokens: TokenSet, work: Work) -> dict[str, Any]:
    """The energy of arXiv 2602.00161, of gates at the sublayers."""
    found = EmpiricalFisher().measure(replay, tokens, work)
    said = {"samples": tokens.samples, "tokens": tokens.tokens}
    return {"h": found.h.tolist(), "J": found.J.tolist(), **said}


def choose_by(
    energy: dict[str, Any], top: int, replay: Replay, tokens: TokenSet, remove: int, work: Work
) -> dict[str, Any]:
    """The ground state of the paper's energy, or of its lowest states that of the lowest KL.

    The passes are those over ``tokens``: the energy's own text is paid for besides, with three.
    """
    h, J = np.array(energy["h"]), np.array(energy["J"])
    made = Hamiltonian(h=h, J=J, c=0.0, unit="arbitrary", meta={})
    spectrum = solve(Problem(made, [count(len(replay), remove)]), k=top)
    if top == 1:
        return {"removed": sorted(map(int, spectrum.removed(0))), "passes": 0.0}
    ledger = open_ledger(replay, tokens, work, "kl")
    losses = ledger.losses(spectrum.states, description="lowest states")
    best = int(np.argmin(losses))
    return {
        "removed": sorted(map(int, spectrum.removed(best))),
        "passes": ledger.passes,
        "position": best,
        "kl": losses.round(4).tolist(),
    }


def conversations(data: Path, tokenizer: Any, count: int, length: int) -> TokenSet:
    """What the paper's energy is measured on: whole conversations, none of those judged on."""
    rows = []
    for line in instructions(data, "estimate")[:count]:
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        rows.append(list(tokenizer(str(text), add_special_tokens=False)["input_ids"])[:length])
    return TokenSet.from_rows([r for r in rows if len(r) > 1])


def stream_sizes(replay: Replay, tokens: TokenSet, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of the stream at every boundary of the original.

    The first token of a sample is left out: many models keep a huge one there.

    Returns:
        (N + 1,) the mean over tokens of its length, and (N + 1, D) of each channel's magnitude.
    """
    n, device = len(replay), replay.device
    lengths, channels = torch.zeros(n + 1), None
    with torch.inference_mode():
        for batch in tokens.batches(work.batch_tokens):
            real = batch.mask.clone()
            real[:, 0] = False
            real = real.to(device)
            for i, before, after in boundaries(replay, batch):
                for k, stream in ((i, before), (i + 1, after)) if i == 0 else ((i + 1, after),):
                    rows = stream[real].float()
                    if channels is None:
                        channels = torch.zeros(n + 1, rows.shape[1])
                    lengths[k] += rows.norm(dim=1).sum().cpu()
                    channels[k] += rows.abs().sum(0).cpu()
    assert channels is not None
    counted = int((tokens.mask.sum(1) - 1).sum())
    return lengths / counted, channels / counted


def runs(removed: list[int]) -> list[tuple[int, int]]:
    """First and last block of each run of consecutive ones."""
    parts = itertools.groupby(enumerate(sorted(removed)), lambda pair: pair[1] - pair[0])
    groups = [[b for _, b in group] for _, group in parts]
    return [(g[0], g[-1]) for g in groups]


def _by_length(lengths: torch.Tensor, _: torch.Tensor, a: int, b: int) -> torch.Tensor:
    return (lengths[b + 1] / lengths[a])[None]


def _by_channel(_: torch.Tensor, channels: torch.Tensor, a: int, b: int) -> torch.Tensor:
    return channels[b + 1] / channels[a].clamp_min(1e-9)


SCALED: dict[str, Callable[..., torch.Tensor]] = {"length": _by_length, "channel": _by_channel}
"""What the stream is multiplied by behind a run of removed blocks. `length`: one number, the ratio
of its mean lengths (magnitude compensation after pruning: arXiv 2507.18212). `channel`: a number
for each channel (as the patch of arXiv 2505.24680 does behind its Hadamard rotation, which is left
out here). Both take the sizes of the original's stream, and leave out each sample's first token."""


def scales(
    kind: str, removed: list[int], sizes: tuple[torch.Tensor, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """By the last block of each run, what the stream behind it is multiplied by."""
    return {b: SCALED[kind](*sizes, a, b) for a, b in runs(removed)}


class Scaled(Replay):
    """The blocks of a model, and scalings of the stream that stand behind them as blocks of their
    own: a state that does without one removes it, so that prefixes are shared with all others.

    Args:
        replay: the model's blocks.
        scalings: by name, what the stream (D,) is multiplied by behind which block.
    """

    def __init__(self, replay: Replay, scalings: dict[str, dict[int, torch.Tensor]]) -> None:
        super().__init__(replay.model, replay.blocks)
        self.scalings = scalings
        # A block has no name.
        self.order = sorted(
            [(b, "") for b in range(len(replay))]
            + [(b, name) for name, factors in scalings.items() for b in factors]
        )

    def __len__(self) -> int:
        return len(self.order)

    def removal(self, blocks: list[int], scaling: str = "") -> list[int]:
        """What is to be removed of this stack for a state without some blocks, scaled or not."""
        return [
            k
            for k, (block, name) in enumerate(self.order)
            if (block in blocks if not name else name != scaling)
        ]

    def identity(self) -> dict[str, Any]:
        factors = {k: {b: f.tolist() for b, f in rows.items()} for k, rows in self.scalings.items()}
        return {**super().identity(), "scalings": factors}

    def record(self, input_ids: torch.Tensor) -> Recording:
        found = super().record(input_ids)
        plain = found.block

        def block(k: int, hidden: torch.Tensor) -> torch.Tensor:
            i, name = self.order[k]
            if not name:
                return plain(i, hidden)
            return (hidden * self.scalings[name][i]).to(hidden.dtype)

        found.block = block  # type: ignore[method-assign]
        return found
