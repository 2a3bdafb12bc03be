"""The paper's estimator in its own setting, and how well it ranks real losses there.

Gate gradients of instruction conversations through the chat template, sublayer gates; the
energies of the first 256, 1,024 and 2,048 of them, with and without the linear term; beside
them the pair energy, measured on as much text as blocks are chosen on. Each is judged by the
measured KL on conversations that none has seen: Spearman over 60 states, the 20 lowest of that
energy and 40 drawn uniformly, the same 40 for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _quality_bench import Bench
from _quality_methods import Choosing
from _quality_rows import ground_states
from _quality_store import Part, Price
from isingcut.data.tokens import TokenSet
from isingcut.energies.empirical_fisher import energy_terms
from isingcut.evaluation.candidates import fidelity, random_feasible
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.states import states_of
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure

GRADIENTS = "estimator/gradients"
BACKWARD = 1.3
"""A backward pass to the gates alone, in forward passes."""


def estimator_parts(
    bench: Bench, removals: Sequence[int], sizes: Sequence[int], pairs: dict[str, Choosing]
) -> list[Part]:
    """The gradients, then one part for each number of removals.

    Args:
        sizes: numbers of conversations, the largest last.
        pairs: where a pair energy was measured, by the name to show.
    """
    tokens = bench.conversations(str(bench.instruction_file("estimate")), samples=sizes[-1])
    held = int(tokens.mask.sum())

    def gradients(journal: Path) -> dict[str, Any]:
        work = bench.work(journal)
        rows = gate_gradients(
            bench.replay,
            tokens,
            gate="sublayer",
            batch_tokens=work.batch_tokens,
            progress=work.progress,
            journal=journal,
        )
        return {
            "samples": tokens.samples,
            "tokens": held,
            "rows": [[float(f"{v:.7g}") for v in row] for row in rows],
        }

    parts = [Part(GRADIENTS, gradients, (Price(held, 1 + BACKWARD, 2),))]
    needs = (GRADIENTS, *(c.name("pairwise") for c in pairs.values()))
    unseen = judged_conversations(bench)
    for m in removals:
        make = _judge(bench, m, sizes, pairs, unseen)
        states = 40 + 20 * (3 + len(pairs))
        price = Price(int(unseen.mask.sum()), states * 0.4 + 1, states + 1)
        parts.append(Part(f"estimator/M{m:02d}", make, (price,), needs))
    return parts


def judged_conversations(bench: Bench) -> TokenSet:
    """About 2,048 tokens of the conversations that only judge."""
    source = str(bench.instruction_file("judge"))
    return bench.conversations(source, tokens=bench.options.estimator_tokens)


def _judge(
    bench: Bench, remove: int, sizes: Sequence[int], pairs: dict[str, Choosing], unseen: TokenSet
) -> Any:
    def make(journal: Path) -> dict[str, Any]:
        rows = np.array(bench.store.read(GRADIENTS)["rows"])
        energies = {
            f"empirical-fisher-{size}{'-linear' if linear else ''}": fisher(rows[:size], linear)
            for size in sizes
            for linear in (False, True)
        }
        energies |= {name: Hamiltonian.load(c.energy_file) for name, c in pairs.items()}
        n, options = bench.n, bench.options
        lowest = {
            name: states_of(n, ground_states(energy, remove, options.lowest))
            for name, energy in energies.items()
        }
        candidates = np.unique(np.concatenate(list(lowest.values())), axis=0)
        flat = Hamiltonian(np.zeros(n), np.zeros((n, n)))
        problem = Problem(flat, [count(n, remove)])
        # Drawn beside every candidate, so that the 40 are the same for all energies.
        random, distribution = random_feasible(problem, options.random_states, 0, candidates)
        states = np.concatenate([candidates, random])
        work = bench.work(journal)
        found = measure(
            bench.replay,
            unseen,
            states,
            batch_tokens=work.batch_tokens,
            progress=work.progress,
            description=f"measuring {len(states)} states with {remove} removed",
            journal=journal,
        )
        kl = {s.tobytes(): float(v) for s, v in zip(states, found.kl, strict=True)}

        def judged(energy: Hamiltonian, chosen: Any) -> dict[str, Any]:
            return fidelity(energy.energies(chosen), np.array([kl[s.tobytes()] for s in chosen]))

        results = {}
        for name, energy in energies.items():
            own = np.concatenate([lowest[name], random])
            results[name] = {
                "unit": energy.unit,
                "all": judged(energy, own),
                "random": judged(energy, random),
                "ground": np.flatnonzero(lowest[name][0]).tolist(),
                "ground_kl": kl[lowest[name][0].tobytes()],
                "best_of_lowest_kl": min(kl[s.tobytes()] for s in lowest[name]),
            }
        return {
            "remove": remove,
            "tokens_judged": int(found.counts.sum()),
            "distribution": f"{options.lowest} lowest of the energy and {len(random)} "
            f"{distribution} (the same for every energy)",
            "lowest_kl_measured": float(found.kl.min()),
            "energies": results,
        }

    return make


def fisher(rows: Any, linear: bool) -> Hamiltonian:
    """The empirical-Fisher energy of gradient rows (m, N)."""
    h, J = energy_terms(rows, linear=linear)
    return Hamiltonian(h=h, J=J, c=0.0, unit="nats/token" if linear else "arbitrary")
