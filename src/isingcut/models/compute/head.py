"""The output head with the loss in one: logits come and go in pieces of the vocabulary.

A model ends in a norm and a linear map to the vocabulary. Run whole, the map writes logits that
the loss reads back from memory, and over a vocabulary of 128k they outweigh everything else. Here
the model runs up to the map's input, and the map goes on in pieces that stay in a CPU's cache.
Where something follows the map (Gemma 2's soft cap, Granite's scale), or the head is no plain
linear layer, the model computes its logits itself, one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from isingcut.data.calibration import TokenSet
from isingcut.ising.states import Floats
from isingcut.models.compute.divergence import RowSums
from isingcut.models.replay import Recording, Replay


def piece_elements(device: torch.device) -> int:
    """Logits to work on at a time: what stays in a CPU's cache; a GPU wants more."""
    return 1 << 19 if device.type == "cpu" else 1 << 26


# A second copy of the map's weight that gradients may hold.
_TRANSPOSED_BYTES = 1 << 28


class _HeadReached(Exception):
    """Raised in the place of the output map: its input is all that was wanted."""


def entering(layer: nn.Module, logits: Callable[[], Tensor]) -> Tensor | None:
    """What enters a model's output layer, where its logits are what the layer gives and no more.

    Args:
        logits: a forward pass of the model.

    Returns:
        None where something follows the layer, or it is called otherwise than once.
    """
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    # A copy: a model may mask in place what the layer gives (Chameleon does).
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args, out.clone())))
    try:
        with torch.no_grad():
            found = logits()
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0][0]) != 1:
        return None
    (inputs,), out = seen[0]
    plain = out.device == found.device and out.dtype == found.dtype and torch.equal(out, found)
    return inputs if plain else None


class OutputHead:
    """The linear output map of a model, apart from what comes before it.

    Args:
        replay: the model.

    Attributes:
        plain: whether the model's logits are the map's output and nothing else.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        found: Any = getattr(replay.text, "get_output_embeddings", lambda: None)()
        if replay.plain_head is None:
            # Looked at once for each model: of a streamed one that reads embedding and head.
            replay.plain_head = type(found) is nn.Linear and self._is_last(found)
        self.plain = replay.plain_head
        self._linear = found

    def _is_last(self, linear: nn.Linear) -> bool:
        replay = self._replay
        ids = torch.zeros((1, 4), dtype=torch.long, device=replay.device)
        inputs = entering(linear, lambda: replay.tail(replay.record(ids).entered, ids))
        return (
            inputs is not None
            and inputs.shape == (1, 4, linear.in_features)
            and inputs.device == linear.weight.device
        )

    @property
    def width(self) -> int:
        """Words in the vocabulary."""
        return int(self._linear.out_features)

    def inputs(self, stream: Tensor, input_ids: Tensor) -> Tensor:
        """What enters the map, (B, T, D), from the stream (B, T, D) that leaves the blocks."""
        caught: list[Tensor] = []

        def stub(x: Tensor) -> Any:
            caught.append(x)
            raise _HeadReached

        self._linear.__dict__["forward"] = stub
        try:
            self._replay.tail(stream, input_ids)
        except _HeadReached:
            pass
        finally:
            del self._linear.__dict__["forward"]
        return caught[0]

    def piece(self, inputs: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """Logits (R, stop - start) of the words from ``start`` on, written to ``out``."""
        weight, bias = self._linear.weight[start:stop].T, self._linear.bias
        if bias is None:
            return torch.mm(inputs, weight, out=out)
        return torch.addmm(bias[start:stop], inputs, weight, out=out)

    def back(self, toward: Tensor, out: Tensor) -> Tensor:
        """Gradient (R, D) in the inputs from that in the logits (R, V), written to ``out``."""
        return torch.mm(toward, self._back_weight, out=out)

    @cached_property
    def _back_weight(self) -> Tensor:
        """The map's weight (V, D), laid out so that the long sum over V is the fast one.

        On a CPU, oneDNN's product with a (V, D) weight as it lies took 1.2 to 1.3 times as long.
        """
        weight: Tensor = self._linear.weight.detach()
        small = weight.numel() * weight.element_size() <= _TRANSPOSED_BYTES
        if weight.device.type == "cpu" and small and not self._replay.streamed:
            return weight.T.contiguous().T
        return weight


class Comparison(Protocol):
    """The original model on one micro-batch, to compare cut models with.

    Attributes:
        nll: (B,) its negative log-likelihood, summed over each sample's tokens, nats.
    """

    nll: Floats

    def compare(self, stream: Tensor) -> tuple[Floats, Floats]:
        """(B,) KL(original || other) and (B,) the other's NLL, summed over a sample's tokens.

        Args:
            stream: (B, T, D), the other's, as it leaves the blocks.
        """
        ...


def comparison(
    head: OutputHead, recording: Recording, stream: Tensor, batch: TokenSet
) -> Comparison:
    """Compare with the original model, whose stream (B, T, D) leaves the blocks."""
    kind = _Fused if head.plain else _BySample
    return kind(head, recording, stream, batch)


class _Fused:
    """Rows of all samples together; keeps the original's logits (R, V) in the model's dtype."""

    def __init__(
        self, head: OutputHead, recording: Recording, stream: Tensor, batch: TokenSet
    ) -> None:
        self._head, self._recording = head, recording
        device = stream.device
        predicted = batch.predicted
        self._sample = predicted.nonzero()[:, 0].numpy()
        self._samples = batch.samples
        # Of each row of (B T): position t predicts token t + 1, the last one nothing.
        last = torch.zeros((batch.samples, 1), dtype=torch.bool)
        self._rows = torch.cat([predicted, last], 1).flatten().nonzero()[:, 0].to(device)
        self._labels = batch.input_ids[:, 1:][predicted].to(device)
        rows = len(self._rows)
        columns = min(head.width, max(1, piece_elements(device) // max(1, rows)))
        starts = range(0, head.width, columns)
        self._pieces = [(a, min(a + columns, head.width)) for a in starts]
        inputs = self._inputs(stream)
        self._buffer = inputs.new_empty(rows * columns)
        own = RowSums(self._labels)
        self._logits = []
        for a, b in self._pieces:
            logits = head.piece(inputs, a, b, inputs.new_empty((rows, b - a)))
            own.add(logits, a)
            self._logits.append(logits)
        self._log_z = own.log_z
        self.nll = self._summed(own.nll)

    def _inputs(self, stream: Tensor) -> Tensor:
        entering = self._head.inputs(stream, self._recording.input_ids)
        return entering.flatten(0, 1).index_select(0, self._rows)

    def _summed(self, values: Floats) -> Floats:
        return np.asarray(np.bincount(self._sample, values, self._samples), dtype=np.float64)

    def compare(self, stream: Tensor) -> tuple[Floats, Floats]:
        inputs = self._inputs(stream)
        sums = RowSums(self._labels, self._log_z)
        for (a, b), reference in zip(self._pieces, self._logits, strict=True):
            out = self._buffer[: len(self._rows) * (b - a)].view(-1, b - a)
            sums.add(self._head.piece(inputs, a, b, out), a, reference)
        return self._summed(sums.kl), self._summed(sums.nll)


class _BySample:
    """The model's own logits, one sample after the other."""

    def __init__(
        self, head: OutputHead, recording: Recording, stream: Tensor, batch: TokenSet
    ) -> None:
        self._recording = recording
        self._references = [
            Reference(recording.logits(stream[s], s), batch, s) for s in range(batch.samples)
        ]
        self.nll = np.array([r.nll for r in self._references])

    def compare(self, stream: Tensor) -> tuple[Floats, Floats]:
        found = [
            reference.compare(self._recording.logits(stream[s], s))
            for s, reference in enumerate(self._references)
        ]
        kl, nll = np.array(found).T
        return kl, nll


class Reference:
    """The original model's distribution over one sample, to compare others with.

    Args:
        logits: (T, V) of the original model; kept.
        batch: the micro-batch the sample is in.
        sample: its row.

    Attributes:
        nll: negative log-likelihood summed over the sample's tokens, nats.
    """

    def __init__(self, logits: Tensor, batch: TokenSet, sample: int) -> None:
        predicted = batch.predicted[sample].to(logits.device)
        # A full sample is a slice; only padded ones pay for a gather.
        self._rows: slice | Tensor = (
            slice(0, int(predicted.numel())) if bool(predicted.all()) else predicted.nonzero()[:, 0]
        )
        self._labels = batch.input_ids[sample, 1:].to(logits.device)[self._rows]
        self._logits = logits[:-1][self._rows]
        own = self._sums(self._logits, None)
        self._log_z = own.log_z
        self.nll = float(own.nll.sum())

    def _sums(self, logits: Tensor, log_z: Tensor | None) -> RowSums:
        sums = RowSums(self._labels, log_z)
        if logits.device.type == "cpu":
            sums.add(logits, 0, None if log_z is None else self._logits)
            return sums
        width = logits.shape[1]
        columns = max(1, piece_elements(logits.device) // max(1, len(logits)))
        for a in range(0, width, columns):
            part = slice(a, a + columns)
            sums.add(logits[:, part], a, None if log_z is None else self._logits[:, part])
        return sums

    def compare(self, logits: Tensor) -> tuple[float, float]:
        """KL(original || other) and the other's NLL, each summed over the sample's tokens."""
        sums = self._sums(logits[:-1][self._rows], self._log_z)
        return float(sums.kl.sum()), float(sums.nll.sum())
