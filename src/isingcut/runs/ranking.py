"""Stages `rank` and `baseline`: measure the candidates, and the choices of other methods.

A baseline chooses on the samples of the energy. Its choice is measured on the split that ranks the
candidates, so that both are comparable.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.baselines import registry
from isingcut.console.progress import silent
from isingcut.data.calibration import Calibration
from isingcut.energies.base import price_states
from isingcut.evaluation import candidates
from isingcut.files import states
from isingcut.files.results import read_document, write_document
from isingcut.healing.repairs import registry as repairs
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import States, states_of
from isingcut.measure.losses import measure
from isingcut.options.choose import ChoiceOptions
from isingcut.runs import benchmarking, constraints, measuring, solving
from isingcut.runs.checks import check_run_tasks
from isingcut.runs.context import Context
from isingcut.runs.cutting import Fit
from isingcut.runs.prices import Prices
from isingcut.runs.stages import Estimate, Inputs, Planned, Runner, stage
from isingcut.runs.trials import (
    MORE,
    TOKENS,
    Trials,
    choose_by_patch,
    is_deep,
    is_searched,
    search_patched,
    trial_tokens,
)


def _price(prices: Prices) -> list[Estimate]:
    """Estimate the ranking of all removals, with trial patches of candidates near the lowest."""
    config = prices.config
    n = prices.n
    # Random states are measured on a quarter of the text.
    states = (config.states + config.random_states // 4, n)
    order = np.random.default_rng(0).random(states).argsort(1).argsort(1)
    seconds = 0.0
    for removed in config.remove.counts or [prices.remove]:
        priced = prices.measurement(config.rank_samples, price_states(order < removed))
        seconds += priced.seconds
        if config.patch == "none":
            continue
        # In deep cuts, trial patches are of the run's kind.
        trial = config.patch if is_deep(removed, n) else "linear"
        tokens = repairs.get(trial).passes / 2 * config.patch_tokens
        if is_searched(config, removed, n, streamed=prices.streamed):
            # A state reads half of the texts of its fit and measurement, and shares the rest.
            tokens += TOKENS * (2 + (n + MORE) * prices.left)
        seconds += tokens * prices.forward
    return [dataclasses.replace(priced, seconds=seconds)]


def _plan(runner: Runner, config: ChoiceOptions) -> Planned:
    folder = runner.folder
    config = solving.with_solved(folder, config)
    files = {
        name: measuring.energy_file(folder, config, name) for name in config.energies
    }
    others = list(files)[1:]
    check_run_tasks(config)
    tasks = benchmarking.prepare_tasks(config) if config.choose == "tasks" else []
    return Planned(
        folder.target(config.removal) / "candidates.json",
        {
            "compared": sorted(others),
            "tasks": benchmarking.question_files(tasks, config),
            "others": {
                name: folder.load(files[name], Hamiltonian.load) for name in others
            },
            "prepared": tasks,
            "trial_tokens": trial_tokens(config),
        },
        config,
    )


@stage(
    "rank",
    solving.load_candidates,
    plan=_plan,
    choose=lambda ranking: ranking.chosen.removed,
    price=_price,
)
def rank(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    if options.prepared:
        benchmarking.check_models(context, options.prepared)
    calibration = inputs.read("calibration", Calibration.load)
    spectrum = inputs.read("spectrum", Spectrum.load)
    split = calibration.splits["rank"]
    problem = solving.problem_of(inputs, options)
    search = problem.hamiltonian.meta.get("search", {})
    mine = search.get("targets", {}).get(options.removal, {})
    more = found_states(spectrum, problem, options.choose, mine)
    layers = [block.layer for block in inputs.blocks.blocks]
    whole = whole_layers(problem, layers) if options.budget else []
    more = np.concatenate([more, states_of(problem.n, whole)])
    best = list[list[int]]()
    count = len(spectrum.removed(0))
    place = inputs.place
    fit = Fit(context, calibration, share=options.patch_share)
    if is_searched(options, count, problem.n, streamed=context.streaming):
        start = np.concatenate([more, spectrum.states])
        few = split.first(TOKENS)
        best = search_patched(
            Trials(fit, few, place / "searched.journal", silent), problem, start
        )
        more = np.concatenate([more, states_of(problem.n, best)])
    considered = spectrum
    if len(more):
        # Further states do not affect the proof of the lowest.
        searched = best or search
        considered = dataclasses.replace(
            Spectrum.from_states(problem, np.concatenate([spectrum.states, more])),
            proven=spectrum.proven,
            solver=spectrum.solver + (" and search" if searched else ""),
            seconds=spectrum.seconds,
            info=spectrum.info,
        )
    work = context.work(place / "candidates.journal")
    ranked = candidates.rank(
        context.replay, split, problem, considered, options.others, options, work
    )
    rows = ranked.candidates
    if quick := one_pass(rows, mine.get("one_pass", [])):
        ranked.one_pass = states.OnePass(
            states=quick,
            passes=search["one_pass_passes"],
            search_passes=search["passes"],
            searched_for=len(search["targets"]),
        )
    ranked.whole = next((row for row in rows if [*row.removed] in whole), None)
    position = ranked.chosen.position
    reason: dict[str, Any] = {"why": ranked.chosen.why}
    if options.prepared and not context.processes.rank:
        position, ranked.by_tasks = benchmarking.choose_by_tasks(
            context, options.prepared, options.seed, rows, place / ".questions"
        )
        reason = {"why": "questions"}
    elif options.trial_tokens:
        trials = Trials(fit, split, place / "patched.journal", context.progress)
        deep = is_deep(count, problem.n)
        near = choose_by_patch(ranked, deep, options, trials.kl, best)
        if len(near) > 1:
            position = near[0]
            compared = [{"position": i, "patched_kl": rows[i].patched_kl} for i in near]
            reason = {"why": "patch", "compared": compared, "deep": deep}
    ranked.chosen = states.ChosenState(
        **rows[position].content(), position=position, **reason
    )
    write_document(out, ranked)


def found_states(
    spectrum: Spectrum, problem: Problem, choose: str, mine: Mapping[str, Any]
) -> States:
    """Return the feasible states that a search found for this removal, those of one pass first.

    For a choice by questions, the state without the last blocks is added if it is feasible: a model
    with the worst loss may score best.

    Args:
        mine: the search's record of this removal; empty without a search.
    """
    rows = (*mine.get("one_pass", []), *mine.get("finalists", []))
    removed = [row["removed"] for row in rows]
    if choose == "tasks":
        removed.append(benchmarking.last_blocks(problem.n, len(spectrum.removed(0))))
    # The spectrum may be solved with more constraints than the search had.
    more = states_of(problem.n, removed)
    return more[problem.feasible(more)]


def whole_layers(problem: Problem, layers: Sequence[int]) -> list[list[int]]:
    """Return the lowest state in which all or no blocks of a layer go; none if each has one.

    Args:
        layers: number of the layer of each block.
    """
    pairs = [(i, i + 1) for i in range(problem.n - 1) if layers[i] == layers[i + 1]]
    rows = [
        LinearConstraint(
            f"layer {layers[i]}", np.eye(problem.n)[i] - np.eye(problem.n)[j], "==", 0
        )
        for i, j in pairs
    ]
    bound = Problem(problem.hamiltonian, [*problem.constraints, *rows])
    if not pairs or not bound.has_states():
        return []
    return [solve(bound, k=1).removed()]


def one_pass(
    rows: Sequence[states.MeasuredState], choices: Sequence[Mapping[str, Any]]
) -> list[states.OnePassLoss]:
    """Return the choices of one-pass methods that are among the measured candidates."""
    measured = {tuple(row.removed): row.content() for row in rows}
    return [
        states.OnePassLoss(**{**measured[tuple(choice["removed"])], **choice})
        for choice in choices
        if tuple(choice["removed"]) in measured
    ]


def _plan_baseline(runner: Runner, config: ChoiceOptions, name: str) -> Planned:
    folder = runner.folder
    if folder.find_finished(folder.target(config.removal) / "spectrum.json"):
        config = solving.with_solved(folder, config)
    part = registry.get(name)()
    counts = config.remove.counts
    count = counts[0] if counts else len(solving.chosen_blocks(folder, config))
    return Planned(
        folder.target(config.removal) / f"baseline-{name}.json",
        {
            "baseline": name,
            "settings": repr(part),
            "count": count,
            "measured_samples": measuring.samples_of(config, config.energy),
            "part": part,
        },
        config,
    )


@stage(
    "baseline", partial(read_document, model=states.BaselineFile), plan=_plan_baseline
)
def compare(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    """Run one baseline for a removal.

    Baselines only support a number of blocks. For a budget or a number per kind, the baseline
    removes as many blocks as the run's chosen state, and ``violated`` lists broken constraints.

    The file has the removed blocks, with their losses on the ranking split, the cost in passes and
    heads (see `isingcut.baselines.base.Outcome`), and the violated constraints of the run.
    """
    splits = inputs.read("calibration", Calibration.load).splits
    searched = splits["energy"].select(range(options.measured_samples))
    part = options.part
    rows = constraints.removal_rows(inputs.blocks, options)
    work = context.work(inputs.place / f"{inputs.file.name}.journal")
    outcome = part.choose(context.replay, searched, options.count, work, options.seed)
    losses = measure(
        context.replay,
        splits["rank"],
        states_of(len(context.replay), [outcome.removed]),
        dataclasses.replace(work, journal=None),
        "measuring the choice",
    )
    content = states.BaselineFile(
        baseline=options.baseline,
        options=dataclasses.asdict(part),
        removed=list(outcome.removed),
        **losses.losses(0),
        passes=outcome.passes,
        heads=outcome.heads,
        tokens_searched=searched.tokens,
        tokens_judged=int(losses.counts.sum()),
        violated=[row.name for row in rows if not row.satisfied(losses.states)[0]],
        info=outcome.info,
    )
    write_document(out, content)
