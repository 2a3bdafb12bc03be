"""Compare measured gate gradients with autograd and with finite differences."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.overrides import TorchFunctionMode

from isingcut.errors import ArchitectureError
from isingcut.measure.gates import run_gated
from tiny import Replay, TokenSet, gate_gradients, relative_difference

_ROUNDING = 1e-9
# With float64, so small that steps rarely cross a jump of the loss (routers, sparse attention).
_STEP = 1e-6
_CURVED = 1e-5


def check_gates(model, stack, tokens):
    """Check the block gates; return whether sublayer gates work too.

    Block gates are compared with autograd on the whole model, sublayer gates with finite
    differences and, at alpha = 0, with a removal; all in float64 (see `_InFloat64`).

    Args:
        model: the model; it is copied.
        stack: its blocks.
        tokens: (B, T) int64.

    Raises:
        ArchitectureError: the blocks cannot be gated at all.
        AssertionError: a gradient or a removal is wrong.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    with _InFloat64():
        # The fused products of experts do not support float64.
        model.set_experts_implementation("eager")
        replay = Replay(model)
        rows = TokenSet.from_rows(tokens.tolist())
        block = gate_gradients(replay, rows, gate="block")
        expected = [
            jacobian(
                partial(gated_loss, replay, rows.select([s]), ()),
                torch.ones(len(stack)),
            )
            for s in range(rows.samples)
        ]
        difference = np.abs(block - np.array([one.numpy() for one in expected])).max()
        error = difference / np.abs(block).max().clip(1e-9)
        assert error <= _ROUNDING, (
            f"block gate gradients differ from autograd by {error:.1e}"
        )
        try:
            sublayer = gate_gradients(replay, rows, gate="sublayer")
        except ArchitectureError:
            return False
        recording = replay.record(tokens)
        entered = [recording.entered]
        with torch.no_grad():
            for i in range(len(stack)):
                entered.append(recording.block(i, entered[i]))
        scale = np.abs(sublayer).max()
        for i in (0, len(stack) // 2, len(stack) - 1):
            up, down = (
                _losses(recording, i, entered[i:], 1 + s * _STEP) for s in (1, -1)
            )
            error = np.abs(sublayer[:, i] - (up - down) / (2 * _STEP)).max() / scale
            assert error <= _CURVED, (
                f"sublayer gate gradients of block {i} differ by {error:.1e}"
            )
            left = relative_difference(
                recording.entered, _gated(recording, i, recording.entered, 0.0)
            )
            assert left <= _ROUNDING, (
                f"a sublayer gate at 0 leaves {left:.1e} of block {i}"
            )
    return True


class _InFloat64(TorchFunctionMode):
    """Compute in float64 even where a model asks for float32, as norms and routers do."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        function = torch.Tensor.double if func is torch.Tensor.float else func
        return function(
            *map(_wide, args), **{k: _wide(v) for k, v in (kwargs or {}).items()}
        )


def _wide(argument):
    return torch.float64 if argument is torch.float32 else argument


def _gated(recording, block, stream, alpha):
    """Return the stream after a block whose sublayer gates are set to a number."""
    with torch.no_grad():
        value = torch.full((len(stream),), alpha)
        return run_gated(recording, block, stream, value, "sublayer")


def _losses(recording, block, entered, alpha):
    """Return the (B,) float64 mean NLL with the sublayer gates of a block set to a number.

    ``entered`` holds the residual stream before that block, before each later one, and at the end.
    """
    stream = _gated(recording, block, entered[0], alpha)
    with torch.no_grad():
        for i in range(block + 1, block + len(entered) - 1):
            stream = recording.block(i, stream)
        found = [
            _nll(recording.logits(stream[s], s), ids)
            for s, ids in enumerate(recording.input_ids)
        ]
    return torch.stack(found).double().numpy()


def _nll(logits, ids):
    return nn.functional.cross_entropy(logits[:-1], ids[1:])


def gated_loss(replay, tokens, added, alpha, *, kl=False):
    """Return the mean loss of the counted tokens with gates as hooks, one sample at a time.

    Args:
        added: modules whose output a block adds to the stream, which get the gates; if empty,
            whole blocks get them.
        alpha: (N,) gates.
        kl: whether the loss is the KL to the original instead of the NLL.
    """

    def gate(alpha):
        def hook(module, args, kwargs, output):
            before = 0 if added else args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            mixed = before + alpha * (after - before)
            return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

        return hook

    def predict(ids, counts):
        logits = replay.text(ids, use_cache=False).logits[0, :-1]
        return logits[counts].log_softmax(-1)

    total = 0.0
    for s, mask in enumerate(tokens.mask):
        ids = tokens.input_ids[s, None, : int(mask.sum())]
        counts = tokens.predicted[s, : ids.shape[1] - 1]
        with torch.no_grad():
            original = predict(ids, counts) if kl else None
        handles = [
            module.register_forward_hook(gate(a), with_kwargs=True)
            for block, a in zip(replay.blocks, alpha, strict=True)
            for module in ([getattr(block, name) for name in added] or [block])
        ]
        logp = predict(ids, counts)
        for handle in handles:
            handle.remove()
        if original is None:
            labels = ids[0, 1:][counts]
            total = total + nn.functional.nll_loss(logp, labels, reduction="sum")
        else:
            total = total + (original.exp() * (original - logp)).sum()
    return total / tokens.tokens
