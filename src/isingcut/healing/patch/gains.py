"""Which linear layers of a block write to the stream but for a gain, where none writes straight.

A change d of what such a layer writes changes the block's output by about c_k g_t d_tk, with one
gain c_k for each channel k and one g_t for each token t: a norm behind the layer (Gemma's and
OLMo 2's post-norms: c is the norm's weight, g one over the root mean square), the gate of a shared
expert (g), or nothing much, where what attention writes is read again by experts (c and g near 1).

Found by trying, as in `absorb`: a small change of random signs, up and down, at all tokens at once.
Medians over tokens and channels, because in half precision a few huge ones round coarsely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.healing.patch.absorb import Write, called_once, pushed
from isingcut.models.replay import Recording

_STEP = 0.25
"""Size of the change, of what the layer writes."""
_UNEXPLAINED = 0.7
_ROUNDS = 3
_DEAD = 1e-3
"""Channels with less than this share of the largest gain take no part."""


@dataclass(frozen=True, eq=False)
class Gained:
    """A layer that writes to the stream but for a gain.

    Attributes:
        write: the layer.
        channels: the gain (D,) of each channel, float64; 0 where the layer does not reach.
        unexplained: share of the answer that gains do not explain, 0 to 1.
    """

    write: Write
    channels: Tensor
    unexplained: float


def gained_writes(recording: Recording, block: nn.Module, i: int, hidden: Tensor) -> list[Gained]:
    """The layers of block ``i`` that write to the stream but for a gain, the straightest first.

    Args:
        hidden: the stream (B, T, D) that enters the block.
    """
    found = []
    for path, module, written in called_once(recording, block, i, hidden):
        answers = _answers(recording, i, hidden, module, written).flatten(0, 1)
        channels, tokens = _rank_one(answers)
        missed = (answers - tokens[:, None] * channels).square().sum(0)
        size = answers.square().sum(0)
        if bool(size.any()):
            unexplained = float((missed / size)[size > 0].median())
            if unexplained <= _UNEXPLAINED:
                found.append(Gained(Write.of(path, module, 1.0), channels, unexplained))
    return sorted(found, key=lambda gained: gained.unexplained)


def token_gains(
    recording: Recording, i: int, hidden: Tensor, gained: Gained, written: Tensor
) -> Tensor:
    """The gain (B, T) of each token, float64."""
    answers = _answers(recording, i, hidden, gained.write.module, written)
    return _of_tokens(answers, gained.channels)


def _answers(recording: Recording, i: int, hidden: Tensor, module: Any, written: Tensor) -> Tensor:
    """Change of the block's output by change of the layer's (B, T, D), float64."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) - 1
    size = written.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    change = signs * (_STEP * size).to(hidden)
    up, down = (pushed(recording, i, hidden, module, c) for c in (change, -change))
    return (up.double() - down.double()) / 2 / change.double()


def _rank_one(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Gains of channels (D,) and of tokens (n,) whose product is nearest to the answers (n, D)."""
    channels = answers.median(0).values
    tokens = torch.ones_like(answers[:, 0])
    for _ in range(_ROUNDS):
        tokens = _of_tokens(answers, channels)
        heard = tokens.abs() > _DEAD * tokens.abs().max()
        if not bool(heard.any()):
            break
        channels = (answers[heard] / tokens[heard, None]).median(0).values
    alive = channels.abs() > _DEAD * channels.abs().max()
    return torch.where(alive, channels, 0.0), tokens


def _of_tokens(answers: Tensor, channels: Tensor) -> Tensor:
    alive = channels.abs() > _DEAD * channels.abs().max()
    if not bool(alive.any()):
        return torch.zeros_like(answers[..., 0])
    return (answers[..., alive] / channels[alive]).median(-1).values
