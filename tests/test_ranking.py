"""Ranking: random states, fidelity, and the choice by measured loss, also after a patch."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import isingcut
from isingcut.console.progress import silent
from isingcut.energies.pairwise import Pairwise
from isingcut.energies.search.proposals import Target, list_exchanges
from isingcut.energies.search.search import GAIN
from isingcut.evaluation.candidates import few_samples, fidelity, random_feasible, rank
from isingcut.evaluation.quality import sample_sums
from isingcut.files.states import CandidatesFile, ChosenState, PatchedState
from isingcut.files.store import Store
from isingcut.ising.constraints import LinearConstraint, count, keep
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.report.words import sentence
from isingcut.runs import cutting, pipeline, trials
from isingcut.runs.folder import read_config
from shared import (
    OPTIONS,
    RunConfig,
    load_json,
    parametrize,
    read_document,
    run_tiny,
)
from tiny import (
    Calibration,
    Hamiltonian,
    Work,
    load_tiny,
    measure,
    random_tokens,
    states_of,
    tiny_replay,
)

pytestmark = [
    pytest.mark.usefixtures("no_speed"),
    pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning"),
]


def flat(n, *rows):
    return Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)


def test_fidelity_is_spearman_of_scipy():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40).round(1)
    b = (a + rng.standard_normal(40)).round(1)
    found = fidelity(a, b)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.spearman_low < found.spearman < found.spearman_high
    assert found.n == 40
    assert fidelity(np.ones(5), np.arange(5.0)).spearman is None, "all are tied"


def test_random_states_are_feasible_distinct_new_and_uniform():
    problem = flat(8, count(8, 3), *keep(8, [0]))
    besides = states_of(8, [range(1, 4)])
    states, words = random_feasible(problem, 34, 0, besides)
    assert len(np.unique(states, axis=0)) == len(states) == 34
    assert problem.feasible(states).all()
    assert not (states == besides).all(1).any()
    assert words == "uniform over the feasible states"
    again, _ = random_feasible(problem, 34, 0, besides)
    np.testing.assert_array_equal(states, again)


def test_with_several_sizes_the_states_of_a_size_are_equally_likely():
    problem = flat(6, LinearConstraint("most", np.ones(6), "<=", 5, "at most 5"))
    none = np.zeros((0, 6), dtype=bool)
    first = [random_feasible(problem, 1, seed, none) for seed in range(300)]
    assert {words for _, words in first} == {
        "uniform over the feasible states of each size"
    }
    sizes = np.bincount([int(states.sum()) for states, _ in first])
    # Of the 63 states one is empty and six have one block: 5 and 29 of 300 if all were as likely.
    assert sizes.min() > 30


def test_rare_feasible_states_are_found_and_their_origin_is_recorded():
    # One state in 2^20 or so satisfies all of these ties.
    n = 40
    pairs = np.eye(n)[::2] - np.eye(n)[1::2]
    ties = [
        LinearConstraint(f"tie {i}", r, "==", 0, "tied") for i, r in enumerate(pairs)
    ]
    problem = flat(n, count(n, 20), *ties)
    states, words = random_feasible(problem, 30, 0, np.zeros((0, n), dtype=bool))
    assert len(states) == 30
    assert problem.feasible(states).all()
    assert "random fields" in words


@pytest.fixture
def ranked():
    """A replay, twenty samples to rank on, a problem, its spectrum and the options of a run."""
    replay = tiny_replay()
    tokens = random_tokens([16] * 24)
    energy = Pairwise().measure(replay, tokens.select(range(4)), Work())
    problem = Problem(energy, [count(len(replay), 2)])
    spectrum = solve(problem, k=6)
    config = RunConfig(model="m", remove="2", random_states=30)
    return replay, tokens.select(range(4, 24)), problem, spectrum, config


def test_the_lowest_measured_candidate_is_chosen(ranked):
    replay, split, problem, spectrum, config = ranked
    found = rank(replay, split, problem, spectrum, {}, config, Work())
    assert found.chosen.kl == min(row.kl for row in found.candidates)
    assert found.candidates[found.chosen.position].removed == found.chosen.removed
    assert len(found.candidates) == 6
    assert found.fidelity.kl.n == 6 + len(found.random)
    config = config.replace(choose="ground", random_states=0)
    ground = rank(replay, split, problem, spectrum, {}, config, Work())
    assert ground.chosen.position == 0


def test_random_states_take_a_quarter_of_the_text_and_are_compared_on_it(ranked):
    replay, split, problem, spectrum, config = ranked
    assert few_samples(16) == [0, 5, 10, 15]
    assert few_samples(3) == [0, 1, 2]
    assert len(few_samples(400)) == 100
    found = rank(replay, split, problem, spectrum, {}, config, Work())
    few = split.select(few_samples(split.samples))
    assert (few.samples, found.random_tokens) == (5, few.tokens)
    # A separate measurement gives the same values.
    drawn = states_of(problem.n, [row.removed for row in found.random])
    states = np.concatenate([spectrum.states, drawn])
    kl = measure(replay, few, states).kl
    expected = fidelity(problem.hamiltonian.energies(states), kl)
    assert dict(found.fidelity.kl) == pytest.approx(dict(expected))
    assert [r.kl for r in found.random] == pytest.approx(kl[len(spectrum) :])
    whole = measure(replay, split, spectrum.states).kl
    assert [r.kl for r in found.candidates] == pytest.approx(whole)


def test_near_candidates_are_patched_for_the_choice(llama, text, tmp_path, spy):
    tried = spy(trials, "changed_losses", lambda *given: given[5], stop=2)
    given = (llama, text, tmp_path / "run")
    options = {"remove": 2, "patch": "linear"}
    with pytest.raises(KeyboardInterrupt):
        run_tiny(*given, **options)
    target = run_tiny(*given, **options)
    found = load_json(target / "candidates.json")
    rows = sorted(found.candidates, key=lambda row: row.kl)
    lowest = rows[0].kl
    near = [
        r for r in rows if r.kl - lowest <= max(0.05 * lowest, 2 * r.above_lowest_se)
    ][:3]
    assert near == [row for row in rows if "patched_kl" in row]
    assert len(tried) == len(near) > 1
    assert set(tried) == {
        f"without {', '.join(map(str, row.removed))}, patched" for row in near
    }
    assert not (target / "patched.journal").exists()
    best, *others = sorted(near, key=lambda row: row.patched_kl)
    ranked = read_document(target / "candidates.json", CandidatesFile)
    assert (ranked.chosen.removed, ranked.chosen.why) == (best.removed, "patch")
    why = sentence("why_words", ranked)
    assert why.startswith(f"lowest KL after a patch: {best['patched_kl']:.4g}, and ")
    assert all(f"{row['patched_kl']:.4g}" in why for row in others)
    # A checkpoint with the same patch has the same KL.
    run = Store.open(target)
    config = read_config(run)
    again = config.replace(patch_tokens=trials.trial_tokens(config))
    runner = pipeline.open_again(run, again)
    run.overwrite = True
    out = cutting.make_model(runner, again, best.removed)
    both = [load_tiny(m).model for m in (llama, out)]
    split = Calibration.load(target / "calibration.safetensors").splits["rank"]
    kl = sample_sums(*both, split)[2].sum() / split.tokens
    assert kl == pytest.approx(best["patched_kl"], rel=1e-4)


def test_a_clear_leader_is_not_patched_for_the_choice():
    near, leader = (
        SimpleNamespace(kl=kl, above_lowest_se=error, removed=removed)
        for kl, error, removed in ((1.11, 0.05, [0, 1]), (1.0, 0.0, [1, 2]))
    )
    quick = SimpleNamespace(states=[near])
    found = SimpleNamespace(candidates=[near, leader], one_pass=quick)
    assert trials.choose_by_patch(found, False, None, None, []) == [1]


@parametrize("patched, chosen", [(0.97, 0), (0.9, 1)])
def test_a_state_of_the_search_is_chosen_if_it_is_clearly_better_after_a_patch(
    patched, chosen
):
    rows = [SimpleNamespace(kl=k, above_lowest_se=0.0, removed=[k]) for k in (1, 2)]
    found = SimpleNamespace(candidates=rows, one_pass=None)
    losses = {1: 1.0, 2: patched}
    order = trials.choose_by_patch(
        found, True, RunConfig(), lambda removed, *_: losses[removed[0]], [[2]]
    )
    assert order == [chosen, 1 - chosen]
    words = "lowest KL " + "as cut, and within 5 % of the lowest " * (not chosen)
    compared = [PatchedState(position=i, patched_kl=losses[i + 1]) for i in order]
    picked = ChosenState.model_construct(why="patch", compared=compared, deep=True)
    ranked = CandidatesFile.model_construct(chosen=picked, samples=16)
    why = sentence("why_words", ranked)
    kls = [f"{losses[i + 1]:.4g}" for i in order]
    assert why == (
        f"{words}after a patch: {kls[0]}, and {kls[1]} of state {order[1]} (16 samples, "
        "compared because the cut is deep)"
    )


def test_a_search_ends_when_a_better_exchange_is_unlikely(monkeypatch):
    n = 12
    remove = 5
    rng = np.random.default_rng(0)
    fields = rng.uniform(1, 2, n)
    couplings = np.triu(rng.uniform(-0.5, 0.5, (n, n)), 1)
    fit = SimpleNamespace(context=SimpleNamespace(progress=silent))
    start = states_of(n, [range(remove), range(n - remove, n)])
    counts = []
    for pairs in (0 * couplings, couplings):
        problem = Problem(Hamiltonian(fields, pairs + pairs.T), [count(n, remove)])
        measured = []

        def measure(removed, kind, tokens, problem=problem, measured=measured):
            measured.append(removed)
            return float(problem.hamiltonian.energies(states_of(n, [removed]))[0])

        patched = SimpleNamespace(fit=fit, kl=measure)
        found = trials.search_patched(patched, problem, start)
        # No better exchange is left, and without couplings no better state.
        loss = measure(found[0], "", 0)
        near = list_exchanges(states_of(n, [found[0]])[0], Target.count(n, remove))
        assert (problem.hamiltonian.energies(near) > (1 - 2 * GAIN) * loss).all()
        assert pairs.any() or found[0] == solve(problem, k=1).removed()
        counts.append(len(measured))
    assert counts[0] < counts[1], "effects that add up need fewer states"


def test_a_deep_cut_is_searched_for_states_that_a_patch_repairs(
    llama, text, tmp_path, monkeypatch, spy
):
    tried = []
    measure_patched = trials.changed_losses
    hidden = [1, 3, 4]

    def nearer_to_hidden_is_better(*given):
        tried.append(given[5])
        if len(tried) == 9:
            raise KeyboardInterrupt
        apart = len(set(given[5]) ^ set(hidden))
        return np.full_like(measure_patched(*given), 1 + apart)

    def settings(found, fit, *given):
        return fit.repair, fit.tokens, fit.training

    kinds = spy(trials, "fit_patch", settings)
    monkeypatch.setattr(trials, "changed_losses", nearer_to_hidden_is_better)
    for name, value in (("NEAR", 0.0), ("ERRORS", 0), ("ROUND", 3), ("TOKENS", 64)):
        monkeypatch.setattr(trials, name, value)
    out = tmp_path / "run"
    given = {"model": llama, "calibration": text, "remove": 3, "keep": "0", "out": out}
    options = {**OPTIONS, **given, "states": 2, "seed": 1, "heal": "4tokens"}
    with pytest.raises(KeyboardInterrupt):
        isingcut.prune(**options)
    isingcut.prune(**options)
    found = load_json(out / "candidates.json")
    quick = min(found.one_pass.states, key=lambda row: row.kl)
    lowest = min(found.candidates, key=lambda row: row.kl)
    # No state is measured twice, before or after the interruption.
    few = OPTIONS["patch_tokens"] // trials.LESS
    count = kinds.index(("tuned", few, None))
    searched = [*tried[:8], *tried[9:count]]
    last = tried[count:]
    assert len({tuple(removed) for removed in searched}) == len(searched)
    # After the first three, blocks that may go are removed or restored, one at a time.
    assert hidden not in searched[:3]
    assert {len(removed) for removed in searched[3:7]} == {2, 4}
    assert not any(0 in removed for removed in searched)
    assert hidden in searched[7:16]
    for removed in (lowest.removed, quick.removed, hidden):
        assert removed in last
    assert set(kinds) == {("linear", 64, None), ("tuned", few, None)}
    assert found.chosen.removed == hidden
    assert (found.chosen.why, found.chosen.deep) == ("patch", True)
    assert not list(out.glob("*.journal"))
    ranked = read_document(out / "candidates.json", CandidatesFile)
    assert "The choice was not made by this KL" in sentence("one_pass_words", ranked)
    ranked.chosen.removed = quick.removed
    assert "but a patch repairs that state less" in sentence("one_pass_words", ranked)
