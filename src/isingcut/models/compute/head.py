"""The output head fused with the loss, forward and backward, in pieces of the vocabulary.

A model ends in a norm and a linear layer to the vocabulary. A full pass of this layer writes logits
that the loss reads back from memory. For a vocabulary of 128k they are larger than everything else.
Here the model runs up to the layer's input, and the layer runs in pieces that fit a CPU's cache. If
something follows the layer (Gemma 2's soft cap, Granite's scale), or the head is not a plain linear
layer, the model computes its logits itself, one sample at a time.

The gradient of a loss with respect to the logits needs no autograd graph. It is softmax - one-hot
for the NLL, and softmax - the original's softmax for the KL. It replaces the logits in a buffer of
a few hundred rows, or of one sample. One matrix product takes it back through the layer. Autograd's
cross-entropy would keep several float32 copies.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.formats.architectures.blocks import replace_forwards
from isingcut.ising.states import Floats
from isingcut.models.compute.divergence import (
    RowSums,
    bits,
    can_compile,
    run_in_threads,
    softmax,
    softmax_gradient,
)
from isingcut.models.replay import Reached, Recording, Replay


def piece_elements(device: torch.device) -> int:
    """Return the number of logits to compute at a time; on a CPU they fit its cache."""
    return 1 << 19 if device.type == "cpu" else 1 << 26


# Maximum bytes of a second copy of the layer's weight, which is kept for gradients.
_TRANSPOSED_BYTES = 1 << 28

Pieces = Iterable[tuple[int, Tensor]]
"""Logits (R, C) of pieces of the vocabulary, each with the index of its first token."""


def find_head_input(layer: nn.Module, logits: Callable[[], Tensor]) -> Tensor | None:
    """Return the input of a model's output layer, if the model's logits are the layer's output.

    Args:
        logits: function that runs a forward pass and returns the model's logits.

    Returns:
        the input, or None if something follows the layer or it is not called exactly once.
    """
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    # A copy, because a model may mask the layer's output in place (Chameleon does).
    hook = layer.register_forward_hook(
        lambda m, args, out: seen.append((args, out.clone()))
    )
    with hook, torch.no_grad():
        whole = logits()
    if len(seen) != 1 or len(seen[0][0]) != 1:
        return None
    (inputs,), out = seen[0]
    plain = (
        out.device == whole.device
        and out.dtype == whole.dtype
        and torch.equal(out, whole)
    )
    return inputs if plain else None


class OutputHead:
    """The linear output layer of a model, to run separately from the modules before it.

    Args:
        replay: the model.

    Attributes:
        plain: whether the model's logits are exactly the output of a plain linear layer.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        layer: Any = replay.text.get_output_embeddings()
        if replay.plain_head is None:
            # Tested once for each model: for a streamed one it reads embedding and head.
            replay.plain_head = type(layer) is nn.Linear and self._is_last(layer)
        self.plain = replay.plain_head
        self._linear = layer

    def _is_last(self, linear: nn.Linear) -> bool:
        replay = self._replay
        ids = torch.zeros((1, 4), dtype=torch.long, device=replay.device)
        inputs = find_head_input(
            linear, lambda: replay.tail(replay.record(ids).entered, ids)
        )
        return (
            inputs is not None
            and inputs.shape == (1, 4, linear.in_features)
            and inputs.device == linear.weight.device
        )

    @property
    def width(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._linear.out_features)

    def inputs(self, stream: Tensor, input_ids: Tensor) -> Tensor:
        """Compute the layer's input (B, T, D) from the stream (B, T, D) after the blocks."""
        caught: list[Tensor] = []

        def stub(x: Tensor) -> Any:
            caught.append(x)
            raise Reached

        with (
            replace_forwards([self._linear], [stub]),
            contextlib.suppress(Reached),
        ):
            self._replay.tail(stream, input_ids)
        return caught[0]

    def logits(
        self, recording: Recording, stream: Tensor, batch: TokenSet
    ) -> Iterator[Pieces]:
        """Yield the logits of a micro-batch's predictions: all together if the head is plain.

        Otherwise the model computes them, one sample at a time.

        Args:
            stream: (B, T, D), the residual stream after the blocks.
        """
        if not self.plain:
            yield from split_predictions(
                map(recording.logits, stream, range(len(stream))), batch
            )
            return
        inputs = self.inputs(stream, recording.input_ids).flatten(0, 1)
        inputs = inputs.index_select(0, _predicting_rows(batch).to(inputs.device))
        step = _piece_columns(inputs, self.width)
        yield ((a, self.piece(inputs, a, a + step)) for a in range(0, self.width, step))

    def piece(
        self, inputs: Tensor, start: int, stop: int, out: Tensor | None = None
    ) -> Tensor:
        """Compute logits (R, stop - start) of the tokens ``start`` to ``stop``, in ``out``."""
        weight = self._linear.weight[start:stop].T
        bias = self._linear.bias
        if bias is None:
            return torch.mm(inputs, weight, out=out)
        return torch.addmm(bias[start:stop], inputs, weight, out=out)

    def back(self, toward: Tensor) -> Tensor:
        """Compute the gradient (R, D) of the inputs from that of the logits (R, V)."""
        return torch.mm(toward, self._back_weight)

    @cached_property
    def _back_weight(self) -> Tensor:
        """The layer's weight (V, D), laid out in memory so that the long sum over V is fast.

        On a CPU, oneDNN's product with the original layout took 1.2 to 1.3 times as long.
        """
        weight: Tensor = self._linear.weight.detach()
        small = weight.numel() * weight.element_size() <= _TRANSPOSED_BYTES
        if weight.device.type == "cpu" and small and not self._replay.streamed:
            return weight.T.contiguous().T
        return weight


def _predicting_rows(batch: TokenSet) -> Tensor:
    """Return the indices in (B T) of positions with a prediction: position t predicts token t + 1,
    the last one nothing."""
    return nn.functional.pad(batch.predicted, (0, 1)).flatten().nonzero()[:, 0]


def _piece_columns(rows: Tensor, width: int) -> int:
    """Return the number of tokens of the vocabulary to compute logits of at a time."""
    return min(width, max(1, piece_elements(rows.device) // max(1, len(rows))))


def select_predictions(logits: Tensor, predicted: Tensor) -> Tensor:
    """Select from a sample's logits (T, V) those of its R predictions that count, (R, V)."""
    count = int(predicted.sum())
    # Without context tokens it is a slice, which needs no copy.
    return (
        logits[:count] if predicted[:count].all() else logits[predicted.nonzero()[:, 0]]
    )


def split_predictions(logits: Iterable[Tensor], batch: TokenSet) -> Iterator[Pieces]:
    """Yield the logits of each sample's predictions, from its logits (T, V)."""
    for rows in map(select_predictions, logits, batch.predicted):
        width = rows.shape[1]
        # The compiled loops make no wider copy of the logits.
        step = width if can_compile(rows) else _piece_columns(rows, width)
        yield zip(range(0, width, step), torch.split(rows, step, 1), strict=True)


class Comparison:
    """Logits of the original model on one micro-batch, to compare other models with.

    The logits are kept in the model's dtype.

    Args:
        logits: those of the R predictions of the batch, all together (`OutputHead.logits`) or by
            sample (`split_predictions`).

    Attributes:
        own: (2, R), the result of `compare` for the original itself.
    """

    def __init__(self, logits: Iterable[Pieces], batch: TokenSet) -> None:
        self._counts = batch.predicted.sum(1)
        self._kept: list[tuple[Tensor, list[Tensor], Tensor]] = []
        own = []
        labels = batch.input_ids[:, 1:][batch.predicted]
        for pieces in logits:
            kept = list(pieces)
            first = kept[0][1]
            sums = RowSums(labels[: len(first)].to(first.device))
            labels = labels[len(first) :]
            for start, piece in kept:
                sums.add(piece, start)
            self._kept.append((sums.labels, [piece for _, piece in kept], sums.log_z))
            own.append(torch.stack([torch.zeros_like(sums.nll), sums.nll]))
        self.own = torch.cat(own, 1)

    def compare(self, logits: Iterable[Pieces]) -> Tensor:
        """Compute KL(original || other) and the other's NLL at each prediction, (2, R), in nats.

        The result stays on the device, so that nothing waits for it before `sum_samples`.

        Args:
            logits: those of the other model, in the form of the original's.
        """
        losses = []
        for pieces, (labels, kept, log_z) in zip(logits, self._kept, strict=True):
            sums = RowSums(labels, log_z)
            for (start, piece), reference in zip(pieces, kept, strict=True):
                sums.add(piece.to(labels.device), start, reference)
            losses.append(torch.stack([sums.kl, sums.nll]))
        return torch.cat(losses, 1)

    def sum_samples(self, losses: Sequence[Tensor]) -> Floats:
        """Sum K results of `compare` over the tokens of each sample: (2, K, B)."""
        values = torch.stack([*losses], 1).cpu().numpy()
        samples = np.split(values, self._counts.cumsum(0)[:-1].numpy(), 2)
        return np.stack([sample.sum(2) for sample in samples], 2)


def sum_losses(
    before: Iterable[Pieces], after: Iterable[Pieces], batch: TokenSet
) -> Floats:
    """Compute (3, B): NLL of both models and KL(original || other), summed over the tokens of each
    sample, in nats."""
    original = Comparison(before, batch)
    (_, kl), nll = original.sum_samples([original.own, original.compare(after)])
    return np.stack([*nll, kl])


def loss_gradient(
    recording: Recording,
    batch: TokenSet,
    hidden: Tensor,
    label_seed: int | None,
    head: OutputHead,
) -> Tensor:
    """Compute the gradient of the loss with respect to the residual stream after the blocks.

    The loss is the sum over the samples of their mean token NLL.

    Args:
        recording: recorded calls of the batch.
        batch: the samples; padding does not count.
        hidden: (B, T, D), the residual stream after the blocks.
        label_seed: seed to draw the labels from the model; None takes the next tokens of the text.
        head: the model's output head; if it is not plain, the model computes its logits itself, one
            sample at a time.

    Returns:
        (B, T, D), zero at positions without a prediction.
    """
    predicted = batch.predicted
    targets = batch.input_ids[:, 1:][predicted]
    if label_seed is not None:
        targets = _draws(batch, label_seed)
    scale = (1 / predicted.sum(1).double())[predicted.nonzero()[:, 0]]
    if not head.plain:
        counts = predicted.sum(1).tolist()
        own = list(
            zip(*(torch.split(x, counts) for x in (targets, scale)), strict=True)
        )

        def gradient_of(sample: int, logits: Tensor) -> Tensor:
            positions = predicted[sample].nonzero()[:, 0].to(logits.device)
            selected = logits[positions]
            _to_gradient(selected, *own[sample])
            return torch.zeros_like(logits).index_copy_(0, positions, selected)

        return _back_by_sample(recording, hidden, gradient_of)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        inputs = head.inputs(leaf, recording.input_ids)  # (B, T, D)
    rows = _predicting_rows(batch).to(inputs.device)
    flat = inputs.detach().flatten(0, 1)
    toward = torch.zeros_like(flat)
    # Enough rows for a fast matrix product, for any vocabulary.
    elements = 1 << 24 if flat.device.type == "cpu" else 1 << 27
    step = max(1, min(len(rows), max(64, elements // head.width)))
    buffer = flat.new_empty((step, head.width))
    for a in range(0, len(rows), step):
        part = slice(a, a + step)
        chosen = flat.index_select(0, rows[part])
        logits = head.piece(chosen, 0, head.width, buffer[: len(chosen)])
        _to_gradient(logits, targets[part], scale[part])
        toward.index_copy_(0, rows[part], head.back(logits))
    (gradient,) = torch.autograd.grad(inputs, leaf, toward.view_as(inputs))
    return gradient


def divergence_gradient(
    recording: Recording, batch: TokenSet, stream: Tensor, original: Tensor
) -> Tensor:
    """Compute the gradient of KL(original || cut), summed over all tokens, with respect to the cut
    model's residual stream.

    Args:
        recording: recorded calls of the batch.
        batch: the samples; padding does not count.
        stream: (B, T, D), residual stream after the blocks of the cut model.
        original: (B, T, D), residual stream after the blocks of the original model.

    Returns:
        (B, T, D), zero at positions without a prediction.
    """

    def gradient_of(sample: int, logits: Tensor) -> Tensor:
        with torch.no_grad():
            whole = recording.logits(original[sample], sample)
        difference = logits.float().softmax(-1) - whole.float().softmax(-1)
        predicted = nn.functional.pad(batch.predicted[sample], (0, 1))
        difference[~predicted.to(logits.device)] = 0.0
        return difference.to(logits.dtype)

    return _back_by_sample(recording, stream, gradient_of)


def _back_by_sample(
    recording: Recording, hidden: Tensor, gradient_of: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Compute the gradient (B, T, D) of a loss, one sample at a time.

    Args:
        gradient_of: function from a sample and its logits (T, V) to the loss's gradient in these.
    """
    out = torch.empty_like(hidden)
    for sample in range(len(hidden)):
        with torch.enable_grad():
            leaf = hidden[sample].detach().requires_grad_(True)
            logits = recording.logits(leaf, sample)
        toward = gradient_of(sample, logits.detach())
        (out[sample],) = torch.autograd.grad(logits, leaf, toward)
    return out


def _draws(batch: TokenSet, seed: int) -> Tensor:
    """Draw (R,) uniform numbers for the predictions; those of a sample depend only on the seed and
    its row in the original set."""
    numbers = [
        np.random.default_rng([seed, int(i)]).random(int(count))
        for i, count in zip(batch.index, batch.predicted.sum(1), strict=True)
    ]
    return torch.from_numpy(np.concatenate(numbers))


def _to_gradient(logits: Tensor, targets: Tensor, scale: Tensor) -> None:
    """Replace logits (R, V) by scale (softmax - one-hot).

    Args:
        targets: (R,) the labels; or uniform numbers, to draw the labels from the model: the tokens
            at which its cumulative distribution exceeds them.
    """
    labels = targets.to(logits.device)
    scale = scale.to(logits.device)
    sums = RowSums(labels.long())
    sums.add(logits)
    log_z = sums.log_z
    if labels.is_floating_point():
        labels = _draw_labels(logits, log_z, labels)
    if can_compile(logits):
        given = (bits(logits), log_z.numpy(), labels.numpy(), scale.float().numpy())
        run_in_threads(softmax_gradient, *given)
        return
    for rows in _row_parts(logits):
        p = softmax(logits[rows], log_z[rows])
        p[torch.arange(len(p), device=p.device), labels[rows]] -= 1
        logits[rows] = (p * scale[rows].to(p)[:, None]).to(logits.dtype)


def _draw_labels(logits: Tensor, log_z: Tensor, draws: Tensor) -> Tensor:
    """Draw (R,) tokens from the distributions of logits (R, V) by inversion of uniform draws
    (R,)."""
    labels = []
    for rows in _row_parts(logits):
        # In float64: the error of a float32 running sum exceeds the probability of most tokens.
        cumulative = softmax(logits[rows], log_z[rows]).double().cumsum(-1)
        wanted = draws[rows][:, None] * cumulative[:, -1:]
        labels.append(torch.searchsorted(cumulative, wanted, right=True)[:, 0])
    return torch.cat(labels).clamp(max=logits.shape[1] - 1)


def _row_parts(logits: Tensor) -> list[slice]:
    """Split the rows into parts that are small enough to convert to a wider dtype."""
    rows = max(1, piece_elements(logits.device) // logits.shape[1])
    return [slice(a, a + rows) for a in range(0, len(logits), rows)]
