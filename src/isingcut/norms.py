"""RMS norms whose way back keeps one number a row instead of float32 copies of the stream.

transformers writes an RMS norm as six operations, and autograd keeps the stream in float32 for
them, twice in every block: nearly half of what a backward pass holds. Here it is one operation
with a compiled loop each way, for CPUs. It stands in only for modules that it reproduces.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isingcut.kernels import bits, compiled_for, in_threads, stored_as, value_of


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _square(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(x.shape[0]):
        total += value_of(x[k]) * value_of(x[k])
    return total


@njit(cache=True, nogil=True)
def _forward(x, weight, epsilon, early, out, scale, first, last):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for t in range(first, last):
        row, to = x[t], out[t]
        s = np.float32(1 / np.sqrt(np.float64(_square(row)) / width + epsilon))
        scale[t] = s
        if early:
            for k in range(width):
                normed = value_of(stored_as(value_of(row[k]) * s, row[k]))
                to[k] = stored_as(weight[k] * normed, row[k])
        else:
            for k in range(width):
                to[k] = stored_as(weight[k] * (value_of(row[k]) * s), row[k])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _along(x, weight, toward):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(x.shape[0]):
        total += value_of(x[k]) * (weight[k] * value_of(toward[k]))
    return total


@njit(cache=True, nogil=True)
def _backward(x, weight, scale, toward, out, first, last):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    for t in range(first, last):
        row, d, to, s = x[t], toward[t], out[t], scale[t]
        bend = _along(row, weight, d) * s * s * s / np.float32(width)
        for k in range(width):
            to[k] = stored_as(s * (weight[k] * value_of(d[k])) - bend * value_of(row[k]), row[k])


class _RMSNorm(torch.autograd.Function):
    """weight x / sqrt(mean(x^2) + epsilon) over the last dimension; the weight is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, early: bool) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        scale = torch.empty(x.numel() // x.shape[-1])
        rows, to = (bits(y).reshape(-1, x.shape[-1]) for y in (x, out))
        w, s = weight.numpy(), scale.numpy()

        def part(first: int, last: int) -> None:
            _forward(rows, w, epsilon, early, to, s, first, last)

        in_threads(part, len(rows), rows.size)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *toward: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        out = torch.empty_like(x)
        rows, d, to = (bits(y).reshape(-1, x.shape[-1]) for y in (x, toward[0], out))
        w, s = weight.numpy(), scale.numpy()

        def part(first: int, last: int) -> None:
            _backward(rows, w, s, d, to, first, last)

        in_threads(part, len(rows), rows.size)
        return out, None, None, None


@dataclass(frozen=True)
class _Form:
    """How a family writes its norm.

    Attributes:
        plus_one: the weight is stored as its difference to one (Gemma).
        early: rounded to the model's type before the weight is multiplied (Llama).
    """

    plus_one: bool
    early: bool

    def of(self, module: Any) -> Callable[[Tensor], Tensor]:
        """The stand-in for a module's forward."""
        weight = module.weight.detach().float() + float(self.plus_one)
        epsilon = _epsilon(module)

        def forward(x: Tensor) -> Tensor:
            out: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
                x, weight, epsilon, self.early
            )
            return out

        return forward


_FORMS = [_Form(plus_one, early) for plus_one in (False, True) for early in (True, False)]


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _stand_in(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A compiled forward that gives what the module's own gives, if there is one."""
    weight = getattr(module, "weight", None)
    if (
        "RMSNorm" not in type(module).__name__
        or not isinstance(weight, Tensor)
        or weight.dim() != 1
        or not compiled_for(weight)
        or weight.dtype not in (torch.bfloat16, torch.float32)
        or weight.requires_grad
        or _epsilon(module) is None
        or len(list(module.parameters())) != 1
        or len(inspect.signature(module.forward).parameters) != 1
        or module._forward_hooks
        or module._forward_pre_hooks
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(3, 4, len(weight), generator=generator)).to(weight.dtype)
    with torch.no_grad():
        expected = module(x)
        for form in _FORMS:
            forward = form.of(module)
            if expected.dtype == x.dtype and _equal(forward(x), expected):
                return forward
    return None


def _equal(got: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of a sum: now and then that tips a rounding to bfloat16."""
    if got.dtype == torch.float32:
        return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    close = torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=1e-6)
    return close and bool((got == expected).float().mean() > 0.98)


@contextlib.contextmanager
def lean_norms(blocks: Sequence[nn.Module]) -> Iterator[int]:
    """Compute the blocks' RMS norms in the compiled way for a while; yields how many.

    Differentiable once. Modules that other code has given a forward of their own are left alone.
    """
    changed: list[nn.Module] = []
    try:
        for block in blocks:
            for module in block.modules():
                if "forward" in module.__dict__:
                    continue
                forward = _stand_in(module)
                if forward is not None:
                    module.__dict__["forward"] = forward
                    changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            del module.__dict__["forward"]
