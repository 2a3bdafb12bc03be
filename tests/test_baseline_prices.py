"""The price of every baseline against the blocks and heads that it really calls.

Calls are counted by hooks that see their inputs. What is computed on the original's own path is
to be paid for once, however often it is repeated; every other call is to be paid for.
"""

import numpy as np
import pytest
import torch

from isingcut.baselines.angular_window import AngularWindow
from isingcut.baselines.block_influence import BlockInfluence
from isingcut.baselines.cbo import BACKWARD, Cbo
from isingcut.baselines.evopress import Evopress
from isingcut.baselines.norm_ratio import NormRatio
from isingcut.baselines.random import Random
from isingcut.baselines.sleb import Sleb
from isingcut.baselines.sliding_window_merging import SlidingWindowMerging
from isingcut.data.tokens import TokenSet
from isingcut.energies.pairwise import Pairwise
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay
from tiny import tiny_model

N, SAMPLES, LENGTH = 6, 3, 12
WORK = Work(batch_tokens=2 * LENGTH)
EVOLUTION = {"generations": 3, "offspring": 4, "step_tokens": (LENGTH, 99), "initial": 4}


class Calls:
    """Block and head calls per sample of one model, on and off the original's path."""

    def __init__(self, replay: Replay, tokens: TokenSet) -> None:
        self.weights = [b.input_layernorm.weight.data_ptr() for b in replay.blocks]
        self.originals: list[torch.Tensor] = []
        with torch.no_grad():
            recording = replay.record(tokens.input_ids)
            stream = recording.entered
            for i in range(N):
                self.originals.append(stream)
                stream = recording.block(i, stream)
            self.originals.append(stream)
        self.on: set[tuple[int, int]] = set()
        self.off = [0] * (N + 1)
        for i, block in enumerate(replay.blocks):
            block.input_layernorm.register_forward_pre_hook(self._counter(i))
        # Before every head there is the norm, however the head itself is computed.
        replay.model.model.norm.register_forward_pre_hook(self._counter(N))

    def _counter(self, i: int):
        def count(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
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
    def passes(self) -> float:
        """Full passes over all samples, the original's path once."""
        return (sum(self.off[:N]) + sum(i < N for i, _ in self.on)) / N / SAMPLES

    @property
    def heads(self) -> tuple[float, float]:
        """Heads over all samples: of the original, counted once, and of other states."""
        return sum(i == N for i, _ in self.on) / SAMPLES, self.off[N] / SAMPLES


@pytest.fixture
def made():
    model = tiny_model("llama").requires_grad_(False)
    replay = Replay(model, stack_modules(model, find_stack(model)))
    rng = np.random.default_rng(0)
    tokens = TokenSet.from_rows([rng.integers(8, 200, LENGTH).tolist() for _ in range(SAMPLES)])
    return replay, tokens, Calls(replay, tokens)


@pytest.mark.parametrize(
    ("part", "passes", "heads"),
    [
        (Random(), 0, 0),
        (AngularWindow(), 1, 0),
        (AngularWindow("all"), 1, 0),
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


@pytest.mark.parametrize("keep_ends", [False, True])
def test_merged_models_are_paid_for_from_their_first_merged_block_on(made, keep_ends):
    replay, tokens, calls = made
    found = SlidingWindowMerging(keep_ends=keep_ends).choose(replay, tokens, 3, WORK, seed=0)
    assert found.passes == pytest.approx(calls.passes)
    assert found.heads == 0, "final hidden states need the norm before the head, and no head"


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
