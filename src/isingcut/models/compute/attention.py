"""Causal attention for CPUs: two matrix products around a compiled softmax that skips the future.

PyTorch's fused attention pays for its tiling at the short lengths that measurements use, and the
plain form goes over its (T, T) weights six times, in float32. Here each row of weights is read
once, up to its own position, and the weights are kept for the backward pass in the model's type.
Heads that share keys are rows of one product, so that keys are never repeated.

`register` adds it to transformers under the name `NAME`, for models that compute attention as
`sdpa`; where a call has more to it than causality (a window, a bias, padding), `sdpa` computes it.
`chosen_attention` lets a model use it, or any other that transformers knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from isingcut.errors import ArchitectureError
from isingcut.models.compute.kernels import bits, exp_of, in_order, in_threads, stored_as, value_of
from isingcut.models.loading import quiet_transformers
from isingcut.models.replay import Replay
from isingcut.models.transformers_private import attention_of

NAME = "causal"


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _exponentials(scores, top, scale):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(scores.shape[0]):
        total += exp_of((value_of(scores[j]) - top) * scale)
    return total


@njit(cache=True, nogil=True)
def _softmax(scores, length, scale, first, last):  # type: ignore[no-untyped-def]
    """Scores (R, T) to weights, in place; row r is position r modulo ``length``."""
    for r in range(first, last):
        seen = scores[r, : r % length + 1]
        largest = in_order(seen[0])
        for j in range(seen.shape[0]):
            largest = in_order(seen[j]) if in_order(seen[j]) > largest else largest
        top = value_of(in_order(largest))
        share = np.float32(1) / _exponentials(seen, top, scale)
        for j in range(seen.shape[0]):
            seen[j] = stored_as(exp_of((value_of(seen[j]) - top) * scale) * share, seen[j])
        scores[r, r % length + 1 :] = 0


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _mean(weights, toward):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(weights.shape[0]):
        total += value_of(weights[j]) * value_of(toward[j])
    return total


@njit(cache=True, nogil=True)
def _softmax_back(weights, toward, length, scale, first, last):  # type: ignore[no-untyped-def]
    """Gradient in the weights (R, T) to that in the unscaled scores, in place."""
    for r in range(first, last):
        n = r % length + 1
        p, d = weights[r, :n], toward[r, :n]
        mean = _mean(p, d)
        for j in range(n):
            d[j] = stored_as(value_of(p[j]) * (value_of(d[j]) - mean) * scale, d[j])
        toward[r, n:] = 0


class _Causal(torch.autograd.Function):
    """softmax(scale q k^T) v over the past, for q (B, H, T, D) and k, v (B, K, T, .)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, _ = query.shape
        shared = key.shape[1]
        # Heads that share a key follow each other: (B K, H/K T, D).
        q = query.reshape(batch * shared, heads // shared * length, query.shape[3])
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2))
        rows, step = bits(weights).reshape(-1, length), np.float32(scale)

        def part(first: int, last: int) -> None:
            _softmax(rows, length, step, first, last)

        in_threads(part, len(rows), rows.size)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = step, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(batch, heads, length, value.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *toward: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        query, key, value = ctx.shapes
        length, scale = query[2], ctx.scale
        out = toward[0].reshape(len(q), q.shape[1], v.shape[2])
        # The transpose of the product, not the product with a transpose: oneDNN is faster at it.
        to_value = torch.bmm(out.transpose(1, 2), weights).transpose(1, 2)
        to_scores = torch.bmm(out, v.transpose(1, 2))
        p, d = (bits(x).reshape(-1, length) for x in (weights, to_scores))

        def part(first: int, last: int) -> None:
            _softmax_back(p, d, length, scale, first, last)

        in_threads(part, len(p), p.size)
        to_query = torch.bmm(to_scores, k).view(query)
        to_key = torch.bmm(q.transpose(1, 2), to_scores).transpose(1, 2)
        # Splitting the first dimension of a transposed product is a view.
        return to_query, to_key.reshape(key), to_value.reshape(value), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention (B, H, T, E) of query (B, H, T, D), key (B, K, T, D), value (B, K, T, E).

    Args:
        query, key, value: bfloat16 or float32 on the CPU; K divides H.
        scale: of the scores, above zero.

    Complexity: two products of T x T weights per head forward and four backward; memory B H T^2
    in the tensors' type. Differentiable once.
    """
    found: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return found


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The form in which transformers calls an attention; (B, T, H, E) out of it."""
    if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        # What `sdpa` would leave out without a word.
        raise ArchitectureError(
            f"{type(module).__name__} has attention sinks or a soft cap, which {NAME!r} has not"
        )
    if (
        attention_mask is not None
        or kwargs.get("position_bias") is not None
        or not causal
        or dropout
        or not scale > 0
        or query.device.type != "cpu"
        or query.dtype not in (torch.bfloat16, torch.float32)
        or query.shape[2] != key.shape[2]
        or query.shape[1] % key.shape[1]
    ):
        from transformers import AttentionInterface

        known: Any = AttentionInterface
        found: tuple[Tensor, None] = known()["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return found
    out = causal_attention(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def pays_in_training(model: Any, length: int, *, half: bool) -> bool:
    """Whether a model is trained faster with it than with sdpa, by rule and not by a timing.

    On one core of an AMD EPYC 9005, forward and backward, sdpa took 2.7 to 4.3 times as long in
    bfloat16 at up to 256 tokens and 1.2 to 1.7 times at 1,024; in float32 1.05 to 1.3 times at up
    to 256, and less above.

    Args:
        length: of the longest sample.
        half: computed in bfloat16.
    """
    if model.device.type != "cpu" or length > (1024 if half else 256):
        return False
    ids = torch.zeros((1, 4), dtype=torch.long)
    try:
        with attending(model, NAME), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except ArchitectureError:
        return False
    return True


@cache
def register() -> None:
    """Make `NAME` known to transformers; masks are made as for `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    masks: Any = AttentionMaskInterface
    AttentionInterface.register(NAME, _attention)
    masks.register(NAME, masks()["sdpa"])


@contextlib.contextmanager
def chosen_attention(replay: Replay, name: str | None = None) -> Iterator[None]:
    """Let the model compute attention as ``name``, or as its replay was tuned to, for a while.

    Raises:
        ArchitectureError: the model has no such implementation.
    """
    with attending(replay.model, name or replay.attention):
        yield


@contextlib.contextmanager
def attending(model: Any, wanted: str | None) -> Iterator[None]:
    """Let a model compute attention so for a while; None changes nothing.

    Raises:
        ArchitectureError: the model has no such implementation.
    """
    before = attention_of(model)
    if wanted is None or wanted == before:
        yield
        return
    reason = f"it computes it as {before!r}"
    try:
        # In the place of sdpa alone: models without that have something it cannot do.
        if wanted != NAME or before == "sdpa":
            register()
            with quiet_transformers():
                model.set_attn_implementation(wanted)
    except (ValueError, ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
    if attention_of(model) != wanted:
        raise ArchitectureError(
            f"{type(model).__name__} cannot compute attention as {wanted!r} ({reason}); "
            "leave --attention out"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)
