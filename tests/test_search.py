"""The refined search: against direct algebra and all states, and through the pipeline."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import isingcut
from isingcut.baselines import registry
from isingcut.energies.refined import Refined
from isingcut.energies.search import (
    Search,
    Target,
    default_passes,
    greedy_price,
    proposals,
)
from isingcut.energies.search import search as search_module
from isingcut.energies.search.evaluator import Estimates, Evaluator
from isingcut.energies.search.proposals import one_pass_states
from isingcut.energies.search.surrogate import SLOPE, Surrogate
from isingcut.files.states import CandidatesFile
from isingcut.ising.constraints import LinearConstraint, count, keep
from isingcut.ising.states import blocks_of, key_of
from isingcut.measure.losses import tree_nodes
from isingcut.report.words import sentence
from isingcut.runs.checks import resolve_energy
from run_files import files_of
from shared import (
    OPTIONS,
    RunConfig,
    flags,
    load_json,
    module_fixture,
    parametrize,
    read_document,
    refuses,
    works,
)
from sweep.gates import gated_loss
from tiny import (
    Hamiltonian,
    TokenSet,
    Work,
    count_rows,
    gate_slopes,
    keep_rows,
    measure,
    states_of,
    tiny_replay,
)

WORK = Work(batch_tokens=64)
N = 8


@module_fixture
def replay():
    return tiny_replay(num_hidden_layers=N)


@module_fixture
def tokens():
    rng = np.random.default_rng(0)
    return TokenSet.from_rows(
        [rng.integers(1, 90, 12 + s % 3).tolist() for s in range(8)]
    )


def all_states(n, m):
    return states_of(n, combinations(range(n), m))


def best(search):
    return [goal.removed for goal in search.goals]


def counts(*removals):
    return [Target.count(N, m) for m in removals]


def random_energy(n, seed):
    return Hamiltonian.from_quadratic(np.random.default_rng(seed).random((n, n)))


# the evaluator ------------------------------------------------------------------------------


def test_evaluator_equals_measuring_at_once(replay, tokens):
    evaluator = Evaluator(replay, tokens, WORK, seed=3)
    states = all_states(N, 3)[:6]
    with evaluator.together("few"):
        evaluator.measure(states[:4], 2, "few")
    evaluator.measure(states, 5, "more")
    evaluator.measure(states, tokens.samples, "all")
    direct = measure(replay, tokens, states).kl_sums[:, evaluator.order]
    found = np.array([evaluator.known[key_of(s)].sums for s in states])
    assert_allclose(found, direct, atol=1e-5)
    assert len(evaluator.known) == len(states)


def test_evaluator_pays_for_each_sample_once(replay, tokens):
    evaluator = Evaluator(replay, tokens, WORK, seed=0)
    states = all_states(N, 2)[:5]
    evaluator.measure(states, 3, "few")
    evaluator.measure(states, 3, "again")
    part = evaluator.ledger.share(range(3))
    paid = evaluator.ledger
    assert Evaluator(replay, tokens, WORK, seed=0).price(states, 3) == paid.passes
    assert paid.passes == pytest.approx((N + tree_nodes(states)) * part / N)
    assert paid.heads == pytest.approx((1 + len(states)) * part)
    evaluator.measure(states, tokens.samples, "all")
    assert paid.passes == pytest.approx((N + tree_nodes(states)) / N)


@parametrize(
    "samples, tokens, rungs",
    [
        (16, 4096, [2, 6, 16]),
        (22, 4200, [3, 8, 22]),
        (128, 32768, [2, 6, 18, 54, 128]),
        (2, 512, [1, 2]),
    ],
)
def test_rungs_begin_with_few_tokens_whatever_the_text_holds(samples, tokens, rungs):
    assert search_module.rungs(samples, tokens) == rungs


def test_a_budget_target_is_searched_where_it_is_met(replay, tokens):
    # Blocks have weight 1 or 2, and a removal needs 4 or more: three or four average blocks.
    weights = np.array([1.0, 2.0] * (N // 2))
    row = LinearConstraint("budget", weights, ">=", 4.0)
    target = Target("params=4", [row])
    assert (target.low, target.size, target.high) == (2, 3, N)
    assert [target.near(all_states(N, m)[:1])[0] for m in (6, 7)] == [True, False]
    search = Search(replay, tokens, WORK, [target], 30.0)
    search._climb()
    measured = np.array([k.state for k in search.evaluator.known.values()])
    assert row.satisfied(measured).any()
    # Paths end when the budget is met, so every grown state needs at least one of its blocks.
    climbed = [state for state in measured if state.sum() > 2]
    assert climbed
    assert all(((weights[s].sum() - weights[s]) < 4.0).any() for s in climbed)
    assert row.satisfied(states_of(N, best(search.run())))[0]


def test_slopes_equal_a_small_step_of_the_gate(replay, tokens):
    # A removed block's slope at gate 0 and a kept one's at gate 1, against finite differences.
    state = states_of(N, [(2, 5)])[0]
    found = gate_slopes(replay, tokens, state, 64)
    gates = torch.tensor(~state, dtype=torch.float32)
    for block in (2, 5, 0, 7):
        step = 2e-3 * torch.eye(N)[block]
        with torch.no_grad():
            up, down = (
                float(gated_loss(replay, tokens, (), gates + by, kl=True))
                for by in (step, -step)
            )
        assert found[block] == pytest.approx((up - down) / 4e-3, rel=0.02, abs=2e-5)


# the surrogate ------------------------------------------------------------------------------


def test_surrogate_mean_is_the_gaussian_posterior():
    # The same posterior from explicit features and precision matrices.
    n = 6
    prior = random_energy(n, 1)
    states = all_states(n, 3)[::2]
    rng = np.random.default_rng(2)
    losses = prior.energies(states) + 0.3 * rng.random(len(states)) + 0.5
    found = Surrogate(prior, states, losses, np.full(len(states), 0.05))
    pairs = list(combinations(range(n), 2))

    def features(x):
        pair = np.array([x[:, i] & x[:, j] for i, j in pairs]).T
        energy = (prior.energies(x) - prior.energies(states).mean())[:, None]
        return np.hstack([np.ones((len(x), 1)), energy, x, pair]).astype(float)

    spread = found.spread
    scale = found._scale
    sd = [scale, SLOPE * found._b]
    sd += [scale * spread.own] * n + [scale * spread.pair] * len(pairs)
    phi = features(states)
    precision = np.diag(1 / np.square(sd)) + phi.T @ (phi / found._sd[:, None] ** 2)
    weights = np.linalg.solve(precision, phi.T @ (found._y / found._sd**2))
    every = all_states(n, 3)
    rows = features(every)
    expected = found._a + found._b * prior.energies(every) + rows @ weights
    assert_allclose(found.mean.energies(every), expected, rtol=1e-6)
    covariance = rows @ np.linalg.solve(precision, rows.T)
    assert_allclose(found.deviation(every), np.sqrt(covariance.diagonal()), rtol=1e-5)


def test_surrogate_samples_have_the_posterior_moments():
    n = 5
    prior = random_energy(5, 3)
    states = all_states(n, 2)[:7]
    losses = 1 + prior.energies(states) + 0.1 * np.arange(7)
    found = Surrogate(prior, states, losses, np.full(7, 0.02))
    rng = np.random.default_rng(0)
    every = all_states(n, 2)
    draws = np.array([found.sample(rng).energies(every) for _ in range(3000)])
    sd = found.deviation(every)
    assert np.abs((draws.mean(0) - found.mean.energies(every)) / sd).max() < 0.1
    assert_allclose(draws.std(0), sd, rtol=0.1)


def test_surrogate_of_many_states_that_cost_nothing():
    # More states than a quadratic form has terms.
    states = all_states(14, 3)
    costly = states[:, 8:].sum(1)
    found = Surrogate(
        Hamiltonian(np.zeros(14), np.zeros((14, 14))),
        states,
        costly + 1e-12,
        0.0 * costly,
    )
    assert np.corrcoef(found.mean.energies(states), costly)[0, 1] > 0.99


def test_low_states_cost_at_least_what_was_measured_of_their_removals():
    # Any two of the last four blocks cost as much as one, which makes all four cost less than zero.
    pairs = np.zeros((N, N))
    pairs[4:, 4:] = -0.4 * (1 - np.eye(4))
    prior = Hamiltonian(np.full(N, 0.4), pairs)
    states = np.concatenate([all_states(N, 2), all_states(N, 3), all_states(N, 4)])
    states = states[states[:, 4:].sum(1) <= 2]
    loss = prior.energies(states)
    found = SimpleNamespace(states=states, loss=loss, sd=0.01 * loss)
    last = states_of(N, [range(4, N)])
    assert Surrogate(prior, states, loss, found.sd).mean.energies(last) < -0.5
    assert proposals.bound_below(last, found) == pytest.approx([0.4])
    bounded = proposals.fit_bounded(prior, found, counts(4)).mean
    assert bounded.energies(last) == pytest.approx([0.4], rel=0.1)
    assert bounded.energies(all_states(N, 4)).min() > 0.35


# proposals and estimates --------------------------------------------------------------------


def test_exchanges_are_all_neighbours_and_feasible():
    state = states_of(7, [(1, 4, 6)])[0]
    target = Target("3", [count(7, 3), *keep(7, [0])])
    found = {tuple(np.flatnonzero(s)) for s in proposals.list_exchanges(state, target)}
    expected = {c for c in combinations(range(1, 7), 3) if len(set(c) & {1, 4, 6}) == 2}
    assert found == expected


def test_estimates_carry_few_samples_over_to_all(replay, tokens):
    evaluator = Evaluator(replay, tokens, WORK, seed=0)
    states = all_states(N, 3)[:12]
    evaluator.measure(states, 2, "few")
    evaluator.measure(states[:6], tokens.samples, "all")
    found = Estimates(evaluator, list(evaluator.known.values()), [2, tokens.samples])
    full = measure(replay, tokens, states).kl
    assert_allclose(found.loss[:6], full[:6], rtol=1e-5)
    assert (found.sd[:6] == 0).all()
    assert (found.sd[6:] > 0).all()
    # A shift that few samples give to all states is removed.
    assert abs(np.log(found.loss[6:] / full[6:]).mean()) < 0.1
    assert found.best() == int(np.argmin(full[:6]))


# the search ---------------------------------------------------------------------------------


def test_search_finds_the_best_state_of_all(replay, tokens):
    found = Search(replay, tokens, WORK, counts(2, 3, 4), 25.0).run()
    for m, removed in zip((2, 3, 4), best(found), strict=True):
        states = np.concatenate([states_of(N, [removed]), all_states(N, m)])
        kl = measure(replay, tokens, states).kl
        assert kl[0] <= kl.min() + 1e-6, m
    assert found.evaluator.ledger.passes <= 25.0


def test_search_stops_when_a_better_state_is_unlikely(tokens, monkeypatch):
    replay = tiny_replay(num_hidden_layers=12)
    spent = []
    for chance in (1.01, 0.05, 0.01):
        monkeypatch.setattr(search_module, "CHANCE", chance)
        found = Search(replay, tokens, WORK, [Target.count(12, 6)], 30.0, seed=2).run()
        spent.append(found.evaluator.ledger.passes)
    assert spent[0] < spent[1] <= spent[2]
    assert spent[1] < 15


def test_gains_are_what_an_exact_minimum_wins():
    states = all_states(6, 3)
    energy = random_energy(6, 1)
    fitted = Surrogate(energy, states, energy.energies(states) + 3, np.full(20, 1e-3))
    rng = np.random.default_rng(0)
    lowest, gains = proposals.draw_minima(fitted, Target.count(6, 3), 3, rng, states[4])
    rng = np.random.default_rng(0)
    rng.integers(2**31, size=3)
    for state, gain in zip(lowest, gains, strict=True):
        drawn = fitted.sample(rng).energies(states)
        assert state.tolist() == states[drawn.argmin()].tolist()
        assert gain == pytest.approx(drawn[4] - drawn.min())


def test_search_with_enough_budget_measures_every_state(replay, tokens):
    found = Search(replay, tokens, WORK, counts(2), 100.0).run()
    assert found.goals[0].exhausted
    kl = measure(replay, tokens, all_states(N, 2)).kl
    assert best(found) == [tuple(blocks_of(all_states(N, 2)[np.argmin(kl)]))]


@parametrize("passes", [1.0, 3.0])
@parametrize("removals", [(4,), (3, 5)])
def test_search_keeps_to_a_small_budget(replay, tokens, passes, removals):
    found = Search(replay, tokens, WORK, counts(*removals), passes).run()
    assert [*map(len, best(found))] == list(removals)
    assert 0.5 * passes <= found.evaluator.ledger.passes <= passes


def test_a_budget_below_any_search_still_gives_a_state(replay, tokens):
    search = Search(replay, tokens, WORK, counts(4), 0.01).run()
    assert len(*best(search)) == 4
    assert [k.n for k in search.evaluator.known.values()] == [search.rungs[0]]


def test_search_is_deterministic_and_resumes(replay, tokens, tmp_path):
    journal = tmp_path / "journal"

    def search(work):
        return Search(replay, tokens, work, counts(3, 4), 5.0, seed=1).run()

    plain = search(WORK)
    search(Work(64, journal=journal))
    rows = count_rows(journal)
    keep_rows(journal, rows // 2)
    resumed = search(Work(64, journal=journal))
    assert count_rows(journal) == rows, "no kept row is measured again"
    assert [g.trace for g in resumed.goals] == [g.trace for g in plain.goals]
    assert resumed.evaluator.ledger.passes == plain.evaluator.ledger.passes


def test_search_refuses_a_single_sample(replay, tokens):
    with refuses("at least 2 calibration samples"):
        Search(replay, tokens.select([0]), WORK, counts(3))
    with refuses("--remove"):
        Refined().measure(replay, tokens, WORK)


def test_one_pass_gives_what_the_methods_of_one_pass_choose(replay, tokens):
    evaluator = Evaluator(replay, tokens, WORK, seed=0)
    for m in (1, 3, 5):
        found = one_pass_states(evaluator, Target.count(N, m), tokens.samples)
        for method in ("angular-window", "block-influence"):
            outcome = registry.get(method)().choose(replay, tokens, m, WORK, 0)
            assert blocks_of(found[method]) == list(outcome.removed), method
    # The pass is counted once, however many targets use it.
    assert evaluator.ledger.passes == pytest.approx(1.0)
    # Every window of four blocks has at least one of these.
    apart = Target("4", [count(N, 4), *keep(N, [2, 5])])
    assert set(one_pass_states(evaluator, apart, tokens.samples)) == {"block-influence"}


def test_a_default_search_costs_at_most_two_fifths_of_a_greedy_path():
    targets = [Target.count(30, m) for m in range(1, 16)]
    prices = [greedy_price(30, t.size) for t in targets]
    found = [default_passes(30, [t]) for t in targets]
    assert found == [max(8, 0.4 * price) for price in prices]
    assert default_passes(30, targets[-2:]) == pytest.approx(sum(found[-2:]))
    assert default_passes(30, targets) == prices[-1]


def test_greedy_price_counts_a_greedy_path():
    # One removal of N: every single state, prefixes shared with the original.
    assert greedy_price(5, 1) == pytest.approx((4 + 3 + 2 + 1 + 0) / 5)
    assert greedy_price(30, 15) > greedy_price(30, 12) > greedy_price(30, 1)


# the energy ---------------------------------------------------------------------------------


def test_effort_in_minutes_is_settled_once(replay, tokens, tmp_path, stub):
    work = Work(64, journal=tmp_path / "journal")
    found = []
    for seconds in (4.0, 1.0):
        stub("isingcut.energies.refined.seconds_per_pass", seconds)
        energy = Refined((Target.count(N, 3),), "1min").measure(replay, tokens, work)
        found.append(energy.meta["search"]["budget_passes"])
    assert found == [15.0, 15.0]


pytestmark = pytest.mark.usefixtures("no_speed")
LITTLE = {**OPTIONS, "energy": "refined", "effort": "6", "samples": 4, "states": 4}


@module_fixture
def inputs(shared, text):
    model = shared.checkpoint(num_hidden_layers=8)
    return {"model": model, "calibration": text, **LITTLE}


@parametrize(
    "asked, energy",
    [
        ({}, "pairwise"),
        ({"remove": "3"}, "refined"),
        ({"budget": "params=20%"}, "refined"),
        ({"energy": "fisher", "remove": "3"}, "fisher"),
    ],
)
def test_auto_is_the_search_where_a_removal_is_given(asked, energy):
    assert (
        resolve_energy(RunConfig(model="m", calibration="c", out="o", **asked)).energy
        == energy
    )


def test_what_the_search_found_is_ranked_and_cut(inputs, tmp_path):
    out = isingcut.run(
        **{**inputs, "states": 2, "effort": "20"}, remove="3", out=tmp_path / "run"
    )
    energy = Hamiltonian.load(out / "hamiltonian.safetensors")
    assert energy.unit == "nats/token"
    finalists = energy.meta["search"]["targets"]["3"]["finalists"]
    ranked = [r.removed for r in load_json(out / "candidates.json").candidates]
    assert all(f["removed"] in ranked for f in finalists)
    solved = [s["removed"] for s in load_json(out / "spectrum.json").states]
    assert ranked[: len(solved)] == solved
    # The spectrum in the report has all measured states, each once.
    shown = files_of(out).spectrum
    assert [s.removed for s in shown.states] == ranked
    assert shown.searched == len(ranked) - len(solved) > 0
    page = (out / "report.html").read_text()
    for words in (
        f"{len(solved)} states by ",
        f"With them {shown.searched} that the search had measured.",
        f"gave {len(ranked)} candidates: the lowest states",
    ):
        assert words in page
    assert load_json(out / "model/config.json").num_hidden_layers == 5
    # The one-pass choices are measured too, and the report shows the gain over them.
    found = read_document(out / "candidates.json", CandidatesFile)
    quick = found.one_pass
    assert {s.method for s in quick.states} == {"angular-window", "block-influence"}
    for state in quick.states:
        assert state.kl == found.candidates[ranked.index(state.removed)].kl
    assert quick.passes == pytest.approx(1.0)
    assert quick.search_passes == energy.meta["search"]["passes"]
    for page in ("report.md", "model/README.md"):
        assert sentence("one_pass_words", found) in (out / page).read_text()


def test_a_range_is_one_search_and_a_ranking_each(inputs, tmp_path, answer):
    out = tmp_path / "curve"
    found = answer("run", *flags({**inputs, "remove": "2..4", "out": out}))
    assert [len(row.removed) for row in found.curve] == [2, 3, 4]
    assert (out / "remove-4/report.html").is_file()
    assert not (out / "model").exists()
    search = Hamiltonian.load(out / "hamiltonian.safetensors").meta["search"]
    assert set(search["targets"]) == {"2", "3", "4"}
    assert search["passes"] <= 6 + 1
    # A number of the range can be cut afterwards, without measuring again.
    works("excise", out, "--remove", 3, "--patch", "none")
    assert load_json(out / "remove-3/model/config.json").num_hidden_layers == 5


def test_effort_belongs_to_the_search(inputs, tmp_path):
    with refuses("--effort is an option of"):
        isingcut.run(
            **{**inputs, "energy": "pairwise"}, remove="3", out=tmp_path / "no"
        )


def test_an_energy_near_a_range_is_solved_for_all_of_it(inputs, tmp_path, answer):
    out = isingcut.energy(**inputs, remove="2..3", out=tmp_path / "near")
    found = answer("solve", out)
    assert [r.removal for r in found.removals] == ["2", "3"]
    assert found.warnings == []
