"""Which linear layer of a block writes straight to the stream, so that it can absorb a linear map.

Found by trying, not by family: a layer qualifies when adding d to its output adds s d to the
block's output, with one number s for all tokens and directions. That holds for the
down-projection of a pre-norm MLP and the output projection of a block that only attends or only
scans; it fails behind a post-norm or a gate (`gains`), and for an expert that sees a part of the
tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.models.replay import Recording

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, eq=False)
class Write:
    """The last linear layer of a block that writes straight to the residual stream.

    The weights are copies, because those of a streamed block are gone when they are needed.

    Attributes:
        path: its name inside the block, for example ``"mlp.down_proj"``.
        module: the layer.
        scale: what its output is multiplied by before it is added (Granite's multiplier).
        transposed: the layer is GPT-2's `Conv1D`, which holds its weight as (F, D).
        weight: the weight as (D, F).
        bias: the bias (D,); None for a layer without one.
    """

    path: str
    module: Any
    scale: float
    transposed: bool
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, path: str, module: Any, scale: float) -> Write:
        """The layer as it is now."""
        transposed = not isinstance(module, nn.Linear)
        weight, bias = module.weight.detach().clone(), module.bias
        return cls(
            path,
            module,
            scale,
            transposed,
            weight.T if transposed else weight,
            None if bias is None else bias.detach().clone(),
        )


@dataclass
class _Seen:
    calls: int = 0
    inputs: Tensor | None = None
    outputs: Tensor | None = None


def find_write(
    recording: Recording, block: nn.Module, i: int, hidden: Tensor, kind: str
) -> Write | None:
    """The layer of block ``i`` that writes straight to the stream, if there is one.

    Args:
        recording: of a few tokens.
        block: the module of block ``i``.
        hidden: the stream (B, T, D) that enters it.
        kind: what the block does.
    """
    candidates, seen, plain, usable = _once(recording, block, i, hidden)
    if "moe" in kind:
        # What attention writes goes through the experts too, though barely where norms are huge.
        usable = [path for path in usable if "attn" not in path and "attention" not in path]
    for path in reversed(usable):
        written = seen[path].outputs
        assert written is not None
        scale = _response(recording, i, hidden, candidates[path], plain, written)
        if scale is not None:
            return Write.of(path, candidates[path], scale)
    return None


def called_once(
    recording: Recording, block: nn.Module, i: int, hidden: Tensor
) -> list[tuple[str, Any, Tensor]]:
    """Linear layers as wide as the stream that a block calls once, for all tokens.

    Returns:
        path, module and output (B, T, D) of each, in the order of the calls.
    """
    candidates, seen, _, usable = _once(recording, block, i, hidden)
    found = []
    for path in usable:
        written = seen[path].outputs
        assert written is not None
        found.append((path, candidates[path], written.reshape(hidden.shape)))
    return found


def read_once(recording: Recording, block: nn.Module, i: int, hidden: Tensor) -> dict[str, Any]:
    """Linear layers of any width that a block calls once, for all tokens; by their paths.

    An expert is called for some tokens, and a layer whose weights a kernel reads is not called.
    """
    candidates = {path: m for path, m in block.named_modules() if path and _is_linear(m)}
    seen, _ = _run(recording, i, hidden, candidates)
    tokens = hidden.shape[:-1].numel()
    return {
        path: candidates[path]
        for path, s in seen.items()
        if s.calls == 1 and s.outputs is not None and s.outputs.shape[:-1].numel() == tokens
    }


def _once(
    recording: Recording, block: nn.Module, i: int, hidden: Tensor
) -> tuple[dict[str, nn.Module], dict[str, _Seen], Tensor, list[str]]:
    width = hidden.shape[-1]
    candidates = {path: m for path, m in block.named_modules() if path and _is_linear(m, width)}
    seen, plain = _run(recording, i, hidden, candidates)
    usable = [
        path
        for path, s in seen.items()
        if s.calls == 1 and s.outputs is not None and s.outputs.numel() == plain.numel()
    ]
    return candidates, seen, plain, usable


def _is_linear(module: nn.Module, width: int | None = None) -> bool:
    """Whether a module is a linear layer, with as many outputs where a number is given."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    plain = isinstance(module, nn.Linear)
    if not plain and type(module).__name__ != "Conv1D":
        return False
    return width is None or weight.shape[0 if plain else 1] == width


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    recording: Recording, i: int, hidden: Tensor, modules: dict[str, nn.Module]
) -> tuple[dict[str, _Seen], Tensor]:
    """The block's output, and the call of each module in the order of the calls."""
    seen: dict[str, _Seen] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            entry = seen.setdefault(path, _Seen())
            entry.calls += 1
            entry.inputs, entry.outputs = args[0], output

        return keep

    with _hooked([m.register_forward_hook(hook(p)) for p, m in modules.items()]):
        return seen, recording.block(i, hidden)


def observe(
    recording: Recording, i: int, hidden: Tensor, write: Write
) -> tuple[Tensor, Tensor, Tensor]:
    """Run block ``i`` and watch its write.

    Returns:
        output of the block (B, T, D), input of the write (B, T, F), output of the write (B, T, D).
    """
    seen, output = _run(recording, i, hidden, {write.path: write.module})
    found = seen[write.path]
    assert found.inputs is not None
    assert found.outputs is not None
    tokens = hidden.shape[:2]
    return output, found.inputs.reshape(*tokens, -1), found.outputs.reshape(*tokens, -1)


def pushed(
    recording: Recording, i: int, hidden: Tensor, module: nn.Module, change: Tensor
) -> Tensor:
    """The output of block ``i`` where one of its layers writes ``change`` (B, T, D) more."""

    def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + change.reshape(output.shape)

    with _hooked([module.register_forward_hook(push)]):
        return recording.block(i, hidden)


def _response(
    recording: Recording,
    i: int,
    hidden: Tensor,
    module: nn.Module,
    plain: Tensor,
    written: Tensor,
) -> float | None:
    """s where the block's output answers a change d of the module's output by s d, else None."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(plain.shape, generator=generator).to(plain)
    # Larger than what the layer writes, so that a norm or a gate behind it would show.
    typical = torch.maximum(plain.abs().median(), 4 * written.abs().median())
    change = change * typical.clamp_min(1e-3)

    answer = (pushed(recording, i, hidden, module, change) - plain).double()
    wide = change.double()
    scale = float((answer * wide).sum() / (wide * wide).sum())
    exact = plain.dtype in _TOLERANCE
    if not exact and abs(scale - 1) < _HALF_TOLERANCE:
        scale = 1.0
    if abs(scale) < 1e-3:
        return None
    wide = scale * wide
    left = answer - wide
    if exact:
        error = float((left.norm(dim=-1) / wide.norm(dim=-1)).max())
    else:
        # A few tokens and channels with huge entries round coarsely; a norm would show everywhere.
        error = float(left.abs().median() / wide.abs().median())
    return scale if error <= allowed_error(plain.dtype) else None


def allowed_error(dtype: torch.dtype) -> float:
    """Largest relative deviation from a straight answer that rounding explains."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)
