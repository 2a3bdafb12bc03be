"""Find the linear layers of a block that write to the residual stream, to fold a linear map in.

They are found by experiment, not by family. A layer writes directly if adding d to its output adds
s d to the block's output, with one number s for all tokens and directions. That holds for the
down-projection of a pre-norm MLP and the output projection of a block with only attention or only
a scan; it fails before a post-norm or a gate, and for an expert that gets only some tokens.

If no layer writes directly, a change d of a layer's output changes the block's output by about
c_k g_t d_tk, with one gain c_k per channel k and one g_t per token t. Examples are a norm after the
layer (Gemma's and OLMo 2's post-norms: c is the norm's weight, g one over the root mean square),
the gate of a shared expert (g), or attention output that experts read too (c and g near 1). The
gains are measured by adding and subtracting a small change of random signs at all tokens at once.
They are medians over tokens and channels, because half precision rounds huge entries coarsely.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from isingcut.models.replay import Recording

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2
_STEP = 0.25
"""Size of the change, relative to the layer's output."""
_UNEXPLAINED = 0.7
_ROUNDS = 3
_DEAD = 1e-3
"""Channels with less than this share of the largest gain are ignored."""


@dataclass(eq=False)
class Write:
    """A linear layer of a block that writes to the residual stream.

    The weights are copies, because a streamed block is unloaded before they are used.

    Args:
        path: name of the layer inside the block, for example ``"mlp.down_proj"``.
        module: the layer.
        scale: factor of the layer's output before the residual addition (Granite's multiplier).
        gains: for a layer that does not write directly, the gain (D,) of each channel, float64; 0
            for channels without effect.

    Attributes:
        transposed: whether the layer is GPT-2's `Conv1D`, which stores its weight as (F, D).
        whole: the weight as (D, F), and the bias, if any, as one more column.
        reads: whether a patch maps the layer's input (true) or its output (false).
    """

    path: str
    module: Any
    scale: float = 1.0
    gains: Tensor | None = None
    reads: bool = True

    def __post_init__(self) -> None:
        module = self.module
        self.biased = module.bias is not None
        self.transposed = not isinstance(module, nn.Linear)
        weight = module.weight.T if self.transposed else module.weight
        columns = [weight, module.bias] if self.biased else [weight]
        self.whole: Tensor = torch.column_stack(columns).detach()

    @property
    def mapped(self) -> int:
        """The number of input features of a map."""
        return int(self.whole.shape[self.reads])

    def features(self, read: Tensor) -> Tensor:
        """Return the input features (B, T, F') of a map: the layer's input (and 1) or output.

        Args:
            read: the layer's input (B, T, F).
        """
        if self.biased:
            read = torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)
        return read if self.reads else functional.linear(read, self.whole)

    def fold(self, change: Tensor) -> dict[str, Tensor]:
        """Return the layer's weight and bias with a map (D, F') folded in.

        The map times the features is the change of the residual stream.
        """
        whole = self.whole.cpu().double()
        change = change.cpu() if self.reads else change.cpu() @ whole
        # For a map of the output: v becomes v + map v / s.
        whole = whole + change / self.scale
        weight = whole[:, :-1] if self.biased else whole
        bias = {"bias": whole[:, -1]} if self.biased else {}
        return {
            "weight": (weight.T if self.transposed else weight).contiguous(),
            **bias,
        }


def find_write(recording: Recording, i: int, hidden: Tensor, kind: str) -> Write | None:
    """Find the last layer of block ``i`` that writes directly to the residual stream, if any.

    Args:
        recording: a recording of a few tokens.
        hidden: the hidden states (B, T, D) before the block.
        kind: the kind of the block.
    """
    layers, plain = list_linear_layers(recording, i, hidden)
    for path, module, written in reversed(layers):
        if written.shape[-1] != hidden.shape[-1]:
            continue
        # Experts read the attention output too, which the test may miss if norms are huge.
        if "moe" in kind and ("attn" in path or "attention" in path):
            continue
        # Larger than the layer's output, so that a norm or a gate after it is detected.
        size = torch.maximum(plain.abs().median(), 4 * written.abs().median())
        size = size.clamp_min(1e-3)
        scale = _constant(_responses(recording, i, hidden, module, size), plain.dtype)
        if scale is not None:
            return Write(path, module, scale)
    return None


def _constant(responses: Tensor, dtype: torch.dtype) -> float | None:
    """Return the number that all responses are equal to, up to rounding in ``dtype``, or None."""
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    scale = float(responses.mean())
    if abs(scale - 1) < tolerance:
        scale = 1.0
    if abs(scale) < 1e-3:
        return None
    left = responses / scale - 1
    # Medians for half precision, which rounds huge entries coarsely.
    exact = dtype in _TOLERANCE
    error = left.square().mean(-1).sqrt().max() if exact else left.abs().median()
    return scale if float(error) <= tolerance else None


def list_linear_layers(
    recording: Recording, i: int, hidden: Tensor
) -> tuple[list[tuple[str, Any, Tensor]], Tensor]:
    """List the linear layers that block ``i`` calls once, for all tokens, in the order of calls.

    Excludes experts, which are called for some tokens only, and layers that are not called because
    a kernel reads their weights.

    Returns:
        path, module and output of each, and the block's output.
    """
    modules = recording.replay.blocks[i].named_modules()
    candidates = {
        path: m for path, m in modules if path and isinstance(m, nn.Linear | Conv1D)
    }
    seen, plain = _run(recording, i, hidden, candidates)
    tokens = hidden.shape[:-1].numel()
    layers = [
        (path, candidates[path], calls[0][1])
        for path, calls in seen.items()
        if len(calls) == 1 and calls[0][1].shape[:-1].numel() == tokens
    ]
    return layers, plain


def _run(
    recording: Recording, i: int, hidden: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Tensor]:
    """Run a block; return input and output of each call of each module, and the block's output."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(path, []).append((args[0], output))

    with contextlib.ExitStack() as hooks:
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, path)))
        return seen, recording.block(i, hidden)


def observe(
    recording: Recording, i: int, hidden: Tensor, write: Write
) -> tuple[Tensor, Tensor, Tensor]:
    """Run block ``i`` and record the input and output of its layer ``write``.

    Returns:
        output of the block (B, T, D), input of the layer (B, T, F), output of the layer (B, T, D).
    """
    seen, output = _run(recording, i, hidden, {write.path: write.module})
    read, written = (t.reshape(*hidden.shape[:2], -1) for t in seen[write.path][-1])
    return output, read, written


def find_scaled_writes(recording: Recording, i: int, hidden: Tensor) -> list[Write]:
    """Find the layers of block ``i`` that write to the stream with a gain, most linear first.

    Args:
        hidden: the hidden states (B, T, D) before the block.
    """
    writes = list[tuple[float, Write]]()
    for path, module, written in list_linear_layers(recording, i, hidden)[0]:
        if written.shape[-1] != hidden.shape[-1]:
            continue
        written = written.reshape(hidden.shape)
        responses = _responses(recording, i, hidden, module, _step(written)).flatten(
            0, 1
        )
        channels, tokens = _rank_one(responses)
        missed = (responses - tokens[:, None] * channels).square().sum(0)
        size = responses.square().sum(0)
        if bool(size.any()):
            unexplained = float((missed / size)[size > 0].median())
            if unexplained <= _UNEXPLAINED:
                writes.append((unexplained, Write(path, module, gains=channels)))
    return [write for _, write in sorted(writes, key=itemgetter(0))]


def token_gains(
    recording: Recording, i: int, hidden: Tensor, write: Write, written: Tensor
) -> Tensor:
    """Return the gain (B, T) of each token, float64."""
    assert write.gains is not None
    responses = _responses(recording, i, hidden, write.module, _step(written))
    return _of_tokens(responses, write.gains)


def _step(written: Tensor) -> Tensor:
    """Return the size (B, T, 1) of a small change of a layer's output (B, T, D)."""
    size = written.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return _STEP * size


def _responses(
    recording: Recording, i: int, hidden: Tensor, module: nn.Module, size: Tensor
) -> Tensor:
    """Return the block's output change per change of the layer's output, (B, T, D), float64.

    Args:
        size: size of the change, whose signs are random.
    """
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) - 1
    change = signs * size.to(hidden)

    def push(sign: int) -> Tensor:
        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + sign * change.reshape(output.shape)

        with module.register_forward_hook(add):
            return recording.block(i, hidden).double()

    return (push(1) - push(-1)) / 2 / change.double()


def _rank_one(responses: Tensor) -> tuple[Tensor, Tensor]:
    """Return gains of channels (D,) and tokens (n,) whose product fits the responses (n, D)."""
    channels = responses.median(0).values
    tokens = torch.ones_like(responses[:, 0])
    for _ in range(_ROUNDS):
        tokens = _of_tokens(responses, channels)
        heard = tokens.abs() > _DEAD * tokens.abs().max()
        if not bool(heard.any()):
            break
        channels = (responses[heard] / tokens[heard, None]).median(0).values
    alive = channels.abs() > _DEAD * channels.abs().max()
    return torch.where(alive, channels, 0.0), tokens


def _of_tokens(responses: Tensor, channels: Tensor) -> Tensor:
    alive = channels.abs() > _DEAD * channels.abs().max()
    if not bool(alive.any()):
        return torch.zeros_like(responses[..., 0])
    return (responses[..., alive] / channels[alive]).median(-1).values
