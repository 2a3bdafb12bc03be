"""The price of every baseline against the blocks and heads that it really calls."""

import pytest
import torch

from calls import LENGTH, N, counted
from isingcut.baselines.angular_window import AngularWindow
from isingcut.baselines.block_influence import BlockInfluence
from isingcut.baselines.cbo import BACKWARD, Cbo
from isingcut.baselines.evopress import Evopress
from isingcut.baselines.norm_ratio import NormRatio
from isingcut.baselines.random import Random
from isingcut.baselines.sleb import Sleb
from isingcut.energies.pairwise import Pairwise
from isingcut.measure.work import Work

WORK = Work(batch_tokens=2 * LENGTH)
EVOLUTION = {"generations": 3, "offspring": 4, "step_tokens": (LENGTH, 99), "initial": 4}


@pytest.fixture
def made():
    return counted()


@pytest.mark.parametrize(
    ("part", "passes", "heads"),
    [
        (Random(), 0, 0),
        (AngularWindow(), 1, 0),
        (BlockInfluence(), 1, 0),
        (NormRatio(), 1, 0),
        (BlockInfluence(iterative=True), None, 0),
        (Sleb(loss="kl", keep_ends=False), None, 1 + 6 + 5 + 4),
        (Sleb(), None, 4 + 3 + 2),
        (Evopress(**EVOLUTION), None, None),
        (Evopress(**EVOLUTION, loss="nll"), None, None),
    ],
    ids=repr,
)
def test_the_claimed_price_is_what_is_called(made, part, passes, heads):
    replay, tokens, calls = made
    found = part.choose(replay, tokens, 3, WORK, seed=0)
    assert found.passes == pytest.approx(calls.passes)
    if passes is not None:
        assert found.passes == passes
    reference, others = calls.heads
    # Only a KL needs the original's head.
    needed = reference if getattr(part, "loss", "") == "kl" else 0
    assert found.heads == pytest.approx(needed + others)
    if heads is not None:
        assert found.heads == heads


@pytest.mark.parametrize("top", [1, 6])
def test_a_gradient_is_the_originals_pass_and_a_backward_at_the_price_of_two(made, top):
    replay, tokens, calls = made
    found = Cbo(top).choose(replay, tokens, 3, WORK, seed=0)
    reference, others = calls.heads
    assert found.passes == pytest.approx(calls.passes + BACKWARD)
    assert found.heads == pytest.approx(reference + others + BACKWARD)
    assert found.info["gradient_passes"] == 1 + BACKWARD
    assert (calls.passes > 1) == (top > 1)


def test_the_pair_energy_is_priced_by_the_same_rule(made):
    replay, tokens, calls = made
    found = Pairwise().measure(replay, tokens, WORK)
    assert found.meta["blocks_run"] / N == pytest.approx(calls.passes)


def test_the_counter_tells_the_originals_path_from_others(made):
    replay, tokens, calls = made
    with torch.no_grad():
        recording = replay.record(tokens.input_ids)
        for _ in range(2):
            recording.block(0, recording.entered)
        assert calls.passes == pytest.approx(1 / N)
        recording.block(3, recording.entered)
        assert calls.passes == pytest.approx(2 / N)
