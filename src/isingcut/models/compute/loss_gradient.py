"""Gradients of losses in the stream that leaves the blocks: the output head, forward and back.

A loss of the logits has a gradient there that needs no graph: softmax less one-hot for the NLL,
softmax less the original's softmax for the KL to it. It takes the place of the logits in a buffer
of a few hundred rows, or in those of one sample, and goes back through the map by one matrix
product; autograd's own cross-entropy would hold several float32 copies of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.models.compute.divergence import RowSums
from isingcut.models.compute.head import OutputHead, piece_elements
from isingcut.models.compute.kernels import bits, compiled_for, in_threads, softmax_gradient
from isingcut.models.replay import Recording


def _buffer_elements(device: torch.device) -> int:
    """Logits held at a time: enough rows for a fast matrix product, whatever the vocabulary."""
    return 1 << 24 if device.type == "cpu" else 1 << 27


def loss_gradient(
    recording: Recording,
    hidden: Tensor,
    batch: TokenSet,
    label_seed: int | None = None,
    head: OutputHead | None = None,
) -> Tensor:
    """Gradient of the samples' mean token NLLs, summed, in the stream that leaves the blocks.

    Args:
        recording: of the batch.
        hidden: (B, T, D), the stream.
        batch: the samples; padding does not count.
        label_seed: None takes the text's own next tokens as labels; with a seed the labels are
            drawn from the model.
        head: the model's output head; without one, or where it is not plain, the model computes
            its logits itself, one sample at a time.

    Returns:
        (B, T, D), zero where nothing is predicted.
    """
    if head is None or not head.plain:
        return _by_sample(recording, hidden, batch, label_seed)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        inputs = head.inputs(leaf, recording.input_ids)  # (B, T, D)
    device, predicted = hidden.device, batch.predicted
    where = torch.cat([predicted, torch.zeros((batch.samples, 1), dtype=torch.bool)], 1)
    rows = where.flatten().nonzero()[:, 0].to(device)
    labels = batch.input_ids[:, 1:][predicted].to(device)
    scale = (1 / predicted.sum(1).double())[predicted.nonzero()[:, 0]].to(device)
    draws = None if label_seed is None else _draws(batch, label_seed)
    entering = inputs.detach().flatten(0, 1)
    toward = torch.zeros_like(entering)
    chosen = entering.index_select(0, rows)
    back = torch.empty_like(chosen)
    step = min(len(rows), max(64, _buffer_elements(device) // head.width))
    buffer = chosen.new_empty((step, head.width))
    for a in range(0, len(rows), max(1, step)):
        part = slice(a, a + step)
        logits = head.piece(chosen[part], 0, head.width, buffer[: len(rows[part])])
        _to_gradient(logits, labels[part], scale[part], None if draws is None else draws[part])
        head.back(logits, back[part])
    toward.index_copy_(0, rows, back)
    (gradient,) = torch.autograd.grad(inputs, leaf, toward.view_as(inputs))
    return gradient


def divergence_gradient(
    recording: Recording, original: Tensor, stream: Tensor, batch: TokenSet
) -> Tensor:
    """Gradient of KL(original || cut), summed over all tokens, in the cut blocks' stream.

    Args:
        recording: of the batch.
        original: (B, T, D), the stream that leaves the original blocks.
        stream: (B, T, D), that of the cut ones.
        batch: the samples; padding does not count.

    Returns:
        (B, T, D), zero where nothing is predicted.
    """
    out = torch.empty_like(stream)
    for s in range(batch.samples):
        with torch.no_grad():
            p = torch.softmax(recording.logits(original[s], s).float(), dim=-1)
        leaf = stream[s].detach().requires_grad_(True)
        logits = recording.logits(leaf, s)  # (T, V)
        difference = torch.softmax(logits.detach().float(), dim=-1) - p
        predicted = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        predicted[: batch.predicted.shape[1]] = batch.predicted[s].to(logits.device)
        difference[~predicted] = 0.0
        (out[s],) = torch.autograd.grad(logits, leaf, difference.to(logits.dtype))
    return out


def _by_sample(
    recording: Recording, hidden: Tensor, batch: TokenSet, label_seed: int | None
) -> Tensor:
    out = torch.empty_like(hidden)
    draws = None if label_seed is None else _draws(batch, label_seed)
    ends = batch.predicted.sum(1).cumsum(0).tolist()
    for s in range(batch.samples):
        with torch.enable_grad():
            leaf = hidden[s].detach().requires_grad_(True)
            logits = recording.logits(leaf, s)  # (T, V)
        positions = batch.predicted[s].nonzero()[:, 0].to(logits.device)
        labels = batch.input_ids[s, 1:].to(logits.device)[positions]
        own = None if draws is None else draws[ends[s] - len(positions) : ends[s]]
        selected = logits.detach()[positions]
        scale = logits.new_full((len(labels),), 1 / max(1, len(labels)), dtype=torch.float64)
        _to_gradient(selected, labels, scale, own)
        toward = torch.zeros_like(logits).index_copy_(0, positions, selected)
        (out[s],) = torch.autograd.grad(logits, leaf, toward)
    return out


def _draws(batch: TokenSet, seed: int) -> Tensor:
    """(R,) uniform numbers for the predicted positions; a sample's depend on its row alone."""
    numbers = [
        np.random.default_rng([seed, int(i)]).random(int(count))
        for i, count in zip(batch.index, batch.predicted.sum(1), strict=True)
    ]
    return torch.from_numpy(np.concatenate(numbers))


def _to_gradient(logits: Tensor, labels: Tensor, scale: Tensor, draws: Tensor | None) -> None:
    """Replace logits (R, V) by scale (softmax - one-hot).

    With ``draws``, uniform numbers, the labels are the model's own: where its cumulative
    distribution passes the draw.
    """
    sums = RowSums(labels)
    sums.add(logits)
    log_z = sums.log_z
    if draws is not None:
        labels = _drawn(logits, log_z, draws.to(logits.device))
    if compiled_for(logits) and logits.dtype in (torch.bfloat16, torch.float32):
        array, z, label, s = bits(logits), log_z.numpy(), labels.numpy(), scale.float().numpy()

        def part(first: int, last: int) -> None:
            softmax_gradient(array, z, label, s, first, last)

        in_threads(part, len(labels), logits.numel())
        return
    for rows in _row_parts(logits):
        p = _softmax(logits[rows], log_z[rows])
        p[torch.arange(len(p), device=p.device), labels[rows]] -= 1
        logits[rows] = (p * scale[rows].to(p)[:, None]).to(logits.dtype)


def _drawn(logits: Tensor, log_z: Tensor, draws: Tensor) -> Tensor:
    """(R,) tokens from the distributions of logits (R, V) and uniform draws (R,), by inversion."""
    found = []
    for rows in _row_parts(logits):
        # In float64: a float32 running sum over a large vocabulary drifts by more than most tokens.
        cumulative = _softmax(logits[rows], log_z[rows]).double().cumsum(-1)
        wanted = draws[rows][:, None] * cumulative[:, -1:]
        found.append(torch.searchsorted(cumulative, wanted, right=True)[:, 0])
    return torch.cat(found).clamp(max=logits.shape[1] - 1)


def _softmax(logits: Tensor, log_z: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide - log_z.to(wide.dtype)[:, None]).exp_()


def _row_parts(logits: Tensor) -> list[slice]:
    """Rows to work on at a time in wide types."""
    rows = max(1, piece_elements(logits.device) // logits.shape[1])
    return [slice(a, a + rows) for a in range(0, len(logits), rows)]
