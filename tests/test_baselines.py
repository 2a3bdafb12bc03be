"""Baselines against direct computations, their cost, and the command."""

import math
import shutil
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

import isingcut
from isingcut.baselines import registry
from isingcut.baselines.angular_window import AngularWindow
from isingcut.baselines.block_influence import BlockInfluence
from isingcut.baselines.cbo import BACKWARD, Cbo
from isingcut.baselines.random import Random
from isingcut.baselines.sleb import Sleb
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.energies.pairwise import Pairwise
from isingcut.measure.losses import tree_nodes
from isingcut.runs import pipeline
from shared import OPTIONS, load_json, module_fixture, parametrize, refuses, works
from tiny import (
    Calibration,
    Context,
    Work,
    count_calls,
    count_rows,
    keep_rows,
    measure,
    random_tokens,
    stack_modules,
    states_of,
    tiny_replay,
    without,
)

N = 6
SAMPLES = 3
LENGTH = 12


class Calls:
    """Counter of block and head calls of one model, on and off the original's path."""

    def __init__(self, replay, tokens):
        self.weights = [b.input_layernorm.weight.data_ptr() for b in replay.blocks]
        self.originals = []
        with torch.no_grad():
            recording = replay.record(tokens.input_ids)
            stream = recording.entered
            for i in range(N):
                self.originals.append(stream)
                stream = recording.block(i, stream)
            self.originals.append(stream)
        self.on = set()
        self.off = [0] * (N + 1)
        for i, block in enumerate(replay.blocks):
            block.input_layernorm.register_forward_pre_hook(self._counter(i))
        # The norm runs before every head, however the head itself is computed.
        replay.model.model.norm.register_forward_pre_hook(self._counter(N))

    def _counter(self, i):
        def count(module, args):
            merged = i < N and module.weight.data_ptr() != self.weights[i]
            if args[0].shape[1] != LENGTH:
                return  # a probe of how the model is built, on a few tokens of its own
            for row in args[0].detach():
                same = (row - self.originals[i]).abs().amax((1, 2)) < 1e-4
                if merged or not same.any():
                    self.off[i] += 1
                else:
                    self.on.add((i, int(same.nonzero()[0])))

        return count

    @property
    def passes(self):
        """Number of full passes over all samples, with the original's path counted once."""
        return (sum(self.off[:N]) + sum(i < N for i, _ in self.on)) / N / SAMPLES

    @property
    def heads(self):
        """Number of heads over all samples: the original's, counted once, and other states'."""
        return sum(i == N for i, _ in self.on) / SAMPLES, self.off[N] / SAMPLES


WORK = Work(batch_tokens=30)


def part(name):
    return registry.get(name)()


@pytest.fixture
def replay():
    return tiny_replay()


@pytest.fixture
def tokens():
    return random_tokens()


def streams(replay, tokens, removed=()):
    """Return the residual stream at each block boundary, unpadded, for each sample, by hooks."""
    model = without(replay.model, removed)
    found = []
    for row, mask in zip(tokens.input_ids, tokens.mask, strict=True):
        seen = []

        def before(module, args, kept=seen):
            kept.append(args[0][0].double())

        parts = [*stack_modules(model), model.model.norm]
        handles = [part.register_forward_pre_hook(before) for part in parts]
        with torch.no_grad():
            model(input_ids=row[mask][None], use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(torch.stack(seen))
    return found


def test_all_baselines_are_found():
    names = "angular-window block-influence cbo random sleb"
    assert " ".join(registry.names()) == names


def check_choice(part, remove):
    """A part removes the wanted number of blocks, and the same ones again."""
    given = (tiny_replay(), random_tokens(), remove, WORK)
    first = part.choose(*given, seed=1)
    assert first == part.choose(*given, seed=1)
    assert list(first.removed) == sorted(set(first.removed))
    assert len(first.removed) == remove
    assert set(first.removed) <= set(range(N))


@parametrize("name", registry.names())
@parametrize("remove", [1, 3])
def test_a_baseline_removes_the_wanted_number_and_the_same_blocks_again(name, remove):
    check_choice(part(name), remove)


@parametrize("remove", [0, 5, 6])
def test_impossible_removals_are_refused(remove):
    with refuses(f"cannot remove {remove} of 6"):
        part("sleb").choose(tiny_replay(), random_tokens(), remove, WORK, seed=0)


def test_block_influence_is_the_mean_over_real_tokens(replay, tokens):
    boundary = torch.cat(streams(replay, tokens), dim=1)  # (N + 1, tokens, D)
    turned = 1 - F.cosine_similarity(boundary[:-1], boundary[1:], dim=-1)
    turned = turned.mean(1).numpy()
    found = BlockInfluence().choose(replay, tokens, 2, WORK, seed=0)
    assert_allclose(found.info["influence"], turned, rtol=1e-4, atol=1e-6)
    assert found.removed == tuple(sorted(np.argsort(turned)[:2]))
    assert found.passes == 1


def test_the_angular_window_is_the_least_turned_one(replay, tokens):
    angles = []
    for stream in streams(replay, tokens):
        cosine = F.cosine_similarity(stream[:-3, -1:], stream[3:, -1:], dim=-1)
        angles.append(cosine.arccos() / math.pi)
    expected = torch.cat(angles, 1).mean(1).numpy()
    found = AngularWindow().choose(replay, tokens, 3, WORK, seed=0)
    assert_allclose(found.info["distance"], expected, rtol=1e-4)
    start = int(expected.argmin())
    assert found.removed == (start, start + 1, start + 2)


@parametrize("loss, ends", [("nll", True), ("kl", False)])
def test_sleb_is_greedy_on_really_removed_blocks(replay, tokens, loss, ends):
    order = []
    for _ in range(3):
        left = [i for i in range(ends, 6 - ends) if i not in order]
        found = measure(replay, tokens, states_of(6, [(*order, i) for i in left]))
        order.append(left[int(np.argmin(getattr(found, loss)))])
    got = Sleb(loss=loss, keep_ends=ends).choose(replay, tokens, 3, WORK, seed=0)
    assert got.info["order"] == order


def test_sleb_keeps_the_ends_to_the_last():
    got = Sleb().choose(tiny_replay(), random_tokens(), 4, WORK, seed=0)
    assert got.removed == (1, 2, 3, 4)
    with refuses("1 to 4"):
        Sleb().choose(tiny_replay(), random_tokens(), 5, WORK, seed=0)
    with refuses("kl or nll"):
        Sleb(loss="ppl").choose(tiny_replay(), random_tokens(), 2, WORK, seed=0)


def test_cbo_is_the_ground_state_of_the_papers_energy_or_the_best_of_its_lowest(
    replay, tokens
):
    energy = EmpiricalFisher().measure(replay, tokens, WORK)
    states = states_of(6, combinations(range(6), 3))
    lowest = states[np.argsort(energy.energies(states))]
    found = Cbo().choose(replay, tokens, 3, WORK, seed=0)
    assert found.removed == tuple(np.flatnonzero(lowest[0]))
    assert (found.passes, found.heads) == (3, 3)
    best = int(np.argmin(measure(replay, tokens, lowest[:8]).kl))
    assert best > 0, "this test needs an excited state to win"
    found = Cbo(top=8).choose(replay, tokens, 3, WORK, seed=0)
    assert found.removed == tuple(np.flatnonzero(lowest[best]))
    assert found.info["position"] == best
    assert found.passes == pytest.approx(3 + tree_nodes(lowest[:8]) / 6)
    assert found.heads == 3 + 8
    # A ``top`` above the number of states.
    assert Cbo(top=99).choose(replay, tokens, 1, WORK, seed=0).heads == 3 + 6
    with refuses("k must be from 1"):
        Cbo(top=0).choose(replay, tokens, 2, WORK, seed=0)


def check_resumed(part, folder):
    """An interrupted search goes on, with the same result and price."""
    replay = tiny_replay()
    work = Work(batch_tokens=30, journal=folder / "j")
    given = (replay, random_tokens(), 3, work)
    first = part.choose(*given, seed=0)
    keep_rows(work.journal, count_rows(work.journal) // 2)
    ran = count_calls(replay.blocks[0].self_attn)
    assert part.choose(*given, seed=0) == first
    half = len(ran)
    assert part.choose(*given, seed=0) == first
    assert half > 0
    assert len(ran) == half, "nothing is measured twice"


def test_an_interrupted_search_goes_on_with_the_same_result_and_price(tmp_path):
    check_resumed(Sleb(), tmp_path)


def test_seeds_matter_to_random_only_where_they_should(replay, tokens):
    drawn = {
        registry.get("random")().choose(replay, tokens, 3, WORK, s).removed
        for s in range(8)
    }
    assert len(drawn) > 3


# prices, against the blocks and heads that are really called ----------------------------------

PAIRS = Work(batch_tokens=2 * LENGTH)


def counted():
    """Return a tiny model, a text, and a counter of the calls from now on."""
    replay = tiny_replay()
    tokens = random_tokens([LENGTH] * SAMPLES)
    return replay, tokens, Calls(replay, tokens)


made = pytest.fixture(counted)


def check_price(part):
    """The claimed price is what is called; return the choice."""
    replay, tokens, calls = counted()
    found = part.choose(replay, tokens, 3, PAIRS, seed=0)
    assert found.passes == pytest.approx(calls.passes)
    reference, others = calls.heads
    # Only a KL needs the original's head.
    needed = reference * (getattr(part, "loss", "kl") == "kl")
    assert found.heads == pytest.approx(needed + others)
    return found


@parametrize(
    "part, passes, heads",
    [
        (Random(), 0, 0),
        (AngularWindow(), 1, 0),
        (BlockInfluence(), 1, 0),
        (Sleb(loss="kl", keep_ends=False), None, 1 + 6 + 5 + 4),
        (Sleb(), None, 4 + 3 + 2),
    ],
    ids=repr,
)
def test_the_claimed_price_is_what_is_called(part, passes, heads):
    found = check_price(part)
    if passes is not None:
        assert found.passes == passes
    assert found.heads == heads


@parametrize("top", [1, 6])
def test_a_gradient_is_the_originals_pass_and_a_backward_at_the_price_of_two(made, top):
    replay, tokens, calls = made
    found = Cbo(top).choose(replay, tokens, 3, PAIRS, seed=0)
    reference, others = calls.heads
    assert found.passes == pytest.approx(calls.passes + BACKWARD)
    assert found.heads == pytest.approx(reference + others + BACKWARD)
    assert (calls.passes > 1) == (top > 1)


def test_the_pair_energy_is_priced_by_the_same_rule(made):
    replay, tokens, calls = made
    found = Pairwise().measure(replay, tokens, PAIRS)
    assert found.meta["blocks_run"] / N == pytest.approx(calls.passes)


@module_fixture
def folder(tmp_path_factory, llama, text):
    """A run folder with a measured energy for the removal of two of six blocks."""
    return pipeline.energy(
        model=llama,
        calibration=text,
        out=tmp_path_factory.mktemp("comparison") / "run",
        **{**OPTIONS, "remove": "2", "compare_energies": "fisher", "keep": "0"},
    )


def test_a_baseline_writes_its_choice_measured_on_the_ranking_split(typed, folder):
    assert "sleb: blocks" in typed("baseline", "sleb", folder).out
    found = load_json(folder / "baseline-sleb.json")
    assert len(found.removed) == 2
    # The three samples of this energy, although the split has more for the other energy.
    assert found.tokens_searched == 3 * 15
    assert found.violated == []
    replay = Context(isingcut.open_run(folder).config).replay
    split = Calibration.load(folder / "calibration.safetensors").splits["rank"]
    kl = measure(replay, split, states_of(6, [found.removed])).kl[0]
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert not list(folder.glob("baseline*.journal"))


def test_the_papers_method_leaves_only_its_result(folder):
    works("baseline", "cbo", folder)
    assert load_json(folder / "baseline-cbo.json").options == {"top": 1}
    assert sorted(p.name for p in folder.glob("*baseline-cbo*")) == [
        "baseline-cbo.json"
    ]


def test_other_removals_and_options_have_files_of_their_own(
    folder, monkeypatch, refusal
):
    arguments = ("baseline", "sleb", folder, "--remove", "3")
    with monkeypatch.context() as other:
        other.setattr(registry, "get", lambda name: partial(Sleb, keep_ends=False))
        works(*arguments)
    found = load_json(folder / "remove-3/baseline-sleb.json")
    assert found.options == {"loss": "nll", "keep_ends": False}
    assert len(found.info.order) == 3
    assert "made with other options" in refusal(*arguments)
    works(*arguments, "--overwrite")


def test_a_broken_constraint_is_reported(folder):
    works("baseline", "angular-window", folder, "--remove", "5")
    found = load_json(folder / "remove-5/baseline-angular-window.json")
    assert found.violated == (["keep 0"] if 0 in found.removed else [])


def test_baseline_without_remove_removes_as_many_blocks_as_the_ranking(
    folder, tmp_path, refusal
):
    out = shutil.copytree(folder, tmp_path / "run")
    budget = ("--budget", "params=30%")
    line = f"first type: isingcut solve {out} --budget params=30%"
    assert line in refusal("baseline", "random", out, *budget)
    for words in (("solve",), ("rank",), ("baseline", "random")):
        works(*words, out, *budget)
    place = out / "remove-params-30_"
    chosen = load_json(place / "candidates.json").chosen.removed
    assert len(load_json(place / "baseline-random.json").removed) == len(chosen)
