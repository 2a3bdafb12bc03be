"""Counts of the blocks and heads that are really called, to compare prices with.

Calls are counted by hooks that see their inputs. What is computed on the original's own path is
to be paid for once, however often it is repeated; every other call is to be paid for.
"""

import torch

from isingcut.data.tokens import TokenSet
from isingcut.models.replay import Replay
from tiny import random_tokens, tiny_replay

N, SAMPLES, LENGTH = 6, 3, 12


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


def counted() -> tuple[Replay, TokenSet, Calls]:
    """A tiny model, a text, and the count of what is called on it from now on."""
    replay, tokens = tiny_replay(), random_tokens([LENGTH] * SAMPLES)
    return replay, tokens, Calls(replay, tokens)
