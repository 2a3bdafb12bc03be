"""Gates: a number alpha per block and sample that scales what the block adds to its input.

A *block* gate turns a block f into h + alpha (f(h) - h). A *sublayer* gate scales by the same
alpha every addition to the residual stream inside the block (arXiv 2602.00161 scales the
attention and the MLP output of a decoder layer). alpha = 1 is the original block, alpha = 0
its removal, for both.

The additions are not found by module name. While a gated block runs, every torch call passes
through a `TorchFunctionMode`: an addition with the current residual stream as an operand is a
residual addition, and the gate scales its other operand. So Gemma's norms after the sublayers,
Cohere's parallel sublayers and Granite's multipliers need no special case.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isingcut.errors import ArchitectureError, InputError
from isingcut.models.compute.divergence import bits, can_compile, fill_row_dots, widen
from isingcut.models.replay import Recording

GATES = ("sublayer", "block")

_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.add_,
    Tensor.__iadd__,
}
# Calls whose result is still the residual stream, in another dtype or layout.
_SAME_STREAM = {
    Tensor.to,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.clone,
    Tensor.contiguous,
    torch.clone,
    Tensor.type_as,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
}

# In-place calls after which a tensor is not the residual stream (the scale of Gemma 4's layers).
_SCALINGS = {Tensor.mul_, Tensor.__imul__}


class _Scale(torch.autograd.Function):
    """The product added * alpha per sample, with the gradient of alpha summed in float32."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(added, alpha)
        return _scale(added, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        added, alpha = ctx.saved_tensors
        return _scale(grad, alpha), row_dots(grad, added)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Compute (B,) float32 scalar products of the samples of ``a`` and ``b`` (B, ...)."""
    a = a.flatten(1)
    b = b.flatten(1)
    # A backward pass that is itself differentiated needs differentiable operations.
    if can_compile(a) and a.dtype == b.dtype and not torch.is_grad_enabled():
        out = torch.empty(len(a))
        fill_row_dots(bits(a), bits(b), out.numpy())
        return out
    return (a.float() * b.float()).sum(1)


def _scale(x: Tensor, alpha: Tensor) -> Tensor:
    return (widen(x) * alpha.view(-1, *([1] * (x.dim() - 1)))).to(x.dtype)


class _ResidualGate(TorchFunctionMode):
    """A mode that scales every residual addition of the block that runs inside it."""

    def __init__(self, residual: Tensor, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # Keep the tensors, not only their ids: the id of a freed tensor is reused.
        self._stream: list[Tensor] = [residual]
        self._scale = scale
        self.additions = 0

    def is_stream(self, value: Any) -> bool:
        return any(value is s for s in self._stream)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ADDITIONS and len(args) >= 2 and not kwargs:
            first = args[0]
            second = args[1]
            if self.is_stream(first) != self.is_stream(second):
                stream, added = (
                    (first, second) if self.is_stream(first) else (second, first)
                )
                if isinstance(added, Tensor) and added.shape == stream.shape:
                    self.additions += 1
                    # Never in place: `stream` may share memory with a tensor still needed.
                    out = torch.add(stream, self._scale(added))
                    self._stream.append(out)
                    return out
        out = func(*args, **kwargs)
        if func in _SAME_STREAM and self.is_stream(args[0]):
            self._stream.append(out)
        if func in _SCALINGS:
            self._stream = [s for s in self._stream if s is not out]
        return out


def run_gated(
    recording: Recording,
    i: int,
    hidden: Tensor,
    alpha: Tensor,
    gate: str,
) -> Tensor:
    """Return the hidden states (B, T, D) after block ``i`` with its gate at ``alpha``.

    Args:
        recording: the recorded calls of the batch.
        i: block index.
        hidden: (B, T, D), input of the block.
        alpha: (B,) float32, one gate per sample.
        gate: ``"sublayer"`` or ``"block"``.

    Raises:
        ArchitectureError: a sublayer gate found no residual addition to act on.
        InputError: unknown gate.
    """
    hidden = recording.move_to_block(i, hidden)
    alpha = alpha.to(hidden.device)

    def scale(added: Tensor) -> Tensor:
        # OPT adds (B T, D) to (B T, D): every token of a sample has the sample's gate.
        repeats = len(added) // len(alpha)
        each = alpha if repeats == 1 else alpha.repeat_interleave(repeats)
        result: Tensor = _Scale.apply(added, each)  # type: ignore[no-untyped-call]
        return result

    if gate == "block":
        return hidden + scale(recording.block(i, hidden) - hidden)
    if gate != "sublayer":
        raise InputError(f"unknown gate {gate!r}; known: {', '.join(GATES)}")
    # A new view, so that this tensor is not the same object as, for example, the embeddings.
    stream = hidden.view_as(hidden)
    with _ResidualGate(stream, scale) as mode:
        out = recording.block(i, stream)
    if mode.additions == 0 or not mode.is_stream(out):
        seen = "only some additions" if mode.additions else "no addition"
        raise ArchitectureError(
            f"{seen} to the residual stream can be scaled inside block {i}, so a sublayer gate "
            "cannot remove it; use the energy 'pairwise', which skips whole blocks "
            '(in Python also gate="block")'
        )
    return out
