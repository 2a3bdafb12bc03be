"""Options of the energy, and of the states that are looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, TypeVar

from isingcut.options import parsed
from isingcut.options.declaration import option
from isingcut.options.text import TextOptions


@dataclass(frozen=True, init=False)
class SearchOptions(TextOptions):
    """How the energy is measured, and what a state must fulfil."""

    remove: parsed.Removal = option(
        parsed.Removal(),
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        metavar="M",
        stages="energy pack solve rank baseline",
    )
    budget: parsed.Budgets = option(
        parsed.Budgets(),
        "Remove at least this much, comma-separated: params=25%, bytes=1GB, kv=30%, "
        "latency=20%@2k (prefill of 2k tokens, by default 128, without the head). Or speed=15%@512 "
        "(decode 15% faster, measured after 512 tokens). Or let `run` choose a GGUF type and how "
        "many blocks go with it, none if quantising is better: file=90MB (the largest file), "
        "memory=2GB@8k (the same with the cache of 8k tokens), decode=25% (fewer bytes to read per "
        "token, which bound decoding).",
        stages="energy pack solve rank baseline",
    )
    keep: parsed.BlockList = option(
        parsed.BlockList(),
        "Blocks to keep, for example 0,1,29.",
        stages="energy pack solve rank baseline",
    )
    must_remove: parsed.BlockList = option(
        parsed.BlockList(),
        "Blocks to remove in any case.",
        stages="energy pack solve rank baseline",
    )
    energy: str = option(
        "auto",
        "How the Hamiltonian is measured. auto: refined with --remove or --budget, else pairwise.",
    )
    compare_energies: str = option(
        "",
        "Further energies to measure and to compare on the same states, comma-separated.",
    )
    effort: parsed.Effort = option(
        parsed.Effort(),
        "Search limit of refined and auto: passes over the text (150) or a time (20min); default: "
        "0.4 of the cost of a greedy search; most searches take half of that.",
        stages="energy",
    )

    @property
    def removal(self) -> str:
        """The text of `remove`, or of `budget` if only that is given."""
        return self.remove or self.budget

    @property
    def energies(self) -> list[str]:
        """The names of all energies to measure, the main one first."""
        others = [name.strip() for name in self.compare_energies.split(",")]
        return list(dict.fromkeys([self.energy, *filter(None, others)]))

    def at(self, remove: int | str) -> Self:
        """Return the options of another removal, which replaces a budget without ``remove``."""
        budget = self.budget if self.remove else ""
        return self.replace(remove=remove, budget=budget)


Search = TypeVar("Search", bound=SearchOptions)
