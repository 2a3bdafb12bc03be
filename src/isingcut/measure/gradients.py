"""Gradients with respect to the gates of all blocks, one row per sample, block by block.

Every sample has its own gate on every block (alpha, B x N, float32), so that the gradient of the
*sum* of the sample losses, d/dalpha, has one row per sample. Only gates require a gradient: no
parameter gradient is allocated, and each linear layer computes its input gradient only.

The forward pass keeps the hidden states before every block. The backward pass takes the gradient
from the head through each block, which is recomputed unless its graph was kept. For a model in
memory as many graphs are kept as fit, and if all fit, this is a plain backward pass; for a streamed
model no graphs are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from isingcut.console.progress import Bar
from isingcut.data.tokens import TokenSet
from isingcut.errors import MemoryExhaustedError
from isingcut.ising.states import Bools, Floats
from isingcut.measure.gates import row_dots, run_gated
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.work import PLAIN, SharedJournal, Work, identity
from isingcut.models.compute.head import OutputHead, divergence_gradient, loss_gradient
from isingcut.models.replay import (
    BLOCK_STREAMS,
    EMBED,
    HEAD,
    Recording,
    Replay,
    use_attention,
)

Backward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from the gradient of a block's output to those of its gates (B,) and its input."""


def _run_gated(
    recording: Recording, block: int, before: Tensor, gate: str
) -> tuple[Tensor, Backward]:
    """Run a loaded block; return its output, and its backward pass, to call while it is loaded."""
    before = recording.move_to_block(block, before)
    alpha = torch.ones(len(before), device=before.device, requires_grad=True)
    # An input from another block's graph is not detached: a leaf would keep its values until its
    # gradient is computed. The input of the first block requires no gradient.
    if not before.requires_grad:
        before = before.detach().requires_grad_(block > 0)
    edges = [get_gradient_edge(x) for x in (alpha, before) if x.requires_grad]
    after = run_gated(recording, block, before, alpha, gate)
    end = get_gradient_edge(after)

    def backward(toward: Tensor) -> tuple[Tensor, Tensor]:
        gradients = torch.autograd.grad(end, edges, toward.to(alpha.device))
        return gradients[0], gradients[-1]

    return after, backward


def _run_removed(recording: Recording, block: int, before: Tensor) -> Backward:
    """Return the backward pass of a block whose gate is 0: the gradient of its output is also that
    of its input."""

    @torch.no_grad()
    def backward(toward: Tensor) -> tuple[Tensor, Tensor]:
        own = recording.move_to_block(block, before)
        change = recording.block(block, own) - own
        toward = toward.to(change.device)
        return row_dots(toward, change), toward

    return backward


Toward = Callable[[Recording, TokenSet, Tensor, Tensor], Tensor]
"""Function that returns the gradient (B, T, D) of the summed sample losses with respect to the
final hidden states, from the recording, the micro-batch, these states, and the original's."""


def gate_rows(
    replay: Replay,
    batches: Sequence[TokenSet],
    gate: str,
    toward: Toward,
    *,
    removed: Bools | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> Iterator[Tensor]:
    """Yield gradients (B, N), float32, of each sample's loss with respect to the gates, per batch.

    For a model in memory, micro-batches run one at a time: each then has the most memory for its
    graphs, and every kept graph saves a forward pass of its block.

    Args:
        gate: ``"sublayer"`` or ``"block"``.
        removed: (N,) bool, blocks with a block gate at 0; all other gates are 1.
        advance: function to call after each step, with the step's share of a micro-batch.

    Raises:
        MemoryExhaustedError: the hidden states of one sample do not fit.

    Complexity: each block is loaded twice. For a model in memory, the graphs of the last blocks are
    kept, as many as fit; the other blocks are computed once more.
    """
    n = len(replay)
    state = np.zeros(n, bool) if removed is None else removed
    # Hidden states before and after every block, the input of the blocks (in the recording), those
    # of the original before and after one block, and two gradients. Kept graphs need fewer.
    streams = n + 6
    order = [EMBED, *range(n), HEAD, *reversed(range(n))]
    for chunk, room in chunks(replay, batches, streams):

        def compute(some: Sequence[TokenSet], room: int = room) -> list[Tensor]:
            each = [replay.stream_bytes(batch) for batch in some]
            left = room - streams * sum(each)
            if left < 0:
                raise MemoryExhaustedError(
                    f"hidden states may take {room / 1e6:.0f} MB, but gradients of "
                    f"{some[0].positions} tokens take {streams * sum(each) / 1e6:.0f} MB; raise "
                    "--memory-limit or lower --length"
                )
            # Graphs cannot be kept when weights are unloaded. A streamed model recomputes blocks
            # while the next weights load.
            graphs = left // (BLOCK_STREAMS * max(each)) // replay.devices
            graphs = 0 if replay.streamed else graphs
            passes = [
                _run_passes(replay, batch, gate, toward, state, graphs)
                for batch in some
            ]
            for part in replay.store.sweep(order):
                rows = []
                for steps in passes:
                    rows.append(next(steps))
                    if part not in (EMBED, HEAD):
                        advance(1 / (2 * n))
            return rows

        yield from split_to_fit(
            replay.limit, batches[chunk], compute, lambda a, b: torch.cat([a, b])
        )


def _run_passes(
    replay: Replay,
    batch: TokenSet,
    gate: str,
    toward: Toward,
    removed: Bools,
    graphs: int,
) -> Iterator[Tensor]:
    """Run a forward and a backward pass of one micro-batch; after each part, yield its rows (B, N),
    which the last part completes.

    No local variable keeps a graph at a yield, because that would take memory until the next part.

    Args:
        graphs: number of graphs to keep on each device, those of its last blocks.
    """
    rows = torch.zeros(batch.samples, len(replay), device=replay.device)
    with torch.no_grad():
        recording = replay.record(batch.input_ids)
    original = recording.entered
    streams = {0: original}
    kept: dict[int, Backward] = {}
    yield rows
    for block in range(len(replay)):
        later = replay.places[block:]
        if removed.any():
            with torch.no_grad():
                original = recording.block(block, original)
        if removed[block]:
            streams[block + 1] = streams[block]
            kept[block] = _run_removed(recording, block, streams.pop(block))
        elif later.count(later[0]) <= graphs:
            streams[block + 1], kept[block] = _run_gated(
                recording, block, streams.pop(block), gate
            )
        else:
            result = _run_gated(recording, block, streams[block], gate)
            streams[block + 1] = result[0].detach()
            del result
        yield rows
    stream = streams.pop(len(replay)).detach()
    gradient = toward(recording, batch, stream, original if removed.any() else stream)
    del stream
    yield rows
    for block in reversed(range(len(replay))):
        if block not in kept:
            kept[block] = _run_gated(recording, block, streams.pop(block), gate)[1]
        rows[:, block], gradient = kept.pop(block)(gradient)
        yield rows


def measure_batches(
    replay: Replay,
    tokens: TokenSet,
    work: Work,
    words: str,
    measure: Callable[[Sequence[TokenSet], Bar], Iterator[Floats]],
    **how: Any,
) -> Floats:
    """Measure rows (m, ...) of the samples, per micro-batch, and keep them in the journal.

    Args:
        words: description for the progress display.
        measure: function that yields the rows of each given micro-batch, in order.
        how: everything else that the numbers depend on.
    """
    batches = {
        str(b): batch for b, batch in enumerate(tokens.batches(work.batch_tokens))
    }
    measured = identity(replay, tokens, batch_tokens=work.batch_tokens, **how)
    kept = SharedJournal(work.journal, measured, replay.processes)
    with work.progress(words, len(batches)) as bar, use_attention(replay):
        todo = [key for key in batches if kept.get(key) is None]
        bar.advance(len(batches) - len(todo))
        own, bar = kept.share(todo, bar)
        mine = [batches[key] for key in own]
        for key, batch, row in zip(own, mine, measure(mine, bar), strict=True):
            check_finite(replay, batch, row)
            kept.put({key: row})
        kept.gather()
    order = np.concatenate([batch.index for batch in batches.values()])
    rows: Floats = np.concatenate([kept.get(key) for key in batches])
    return rows[np.argsort(order)]


def gate_gradients(
    replay: Replay,
    tokens: TokenSet,
    work: Work = PLAIN,
    *,
    gate: str = "sublayer",
    label_seed: int | None = None,
) -> Floats:
    """Compute gradients of each sample's mean token NLL with respect to the gates, at alpha = 1.

    Args:
        replay: the model's blocks; parameters must not require gradients.
        tokens: m samples; padding does not count.
        gate: ``"sublayer"`` (as in the paper) or ``"block"``.
        label_seed: None to use the text's next tokens as labels, or a seed to sample every label
            from the model's distribution. A sample's labels depend on the seed and its row only,
            not on the batches.

    Returns:
        (m, N) float64, computed in float32, nats per token.

    Complexity: about 2 to 2.5 forward passes, 3 if activations do not fit; memory for the
    activations of one micro-batch. A streamed model is read twice per chunk of micro-batches.

    Source: arXiv 2602.00161 (its gate gradients; the sign is that of d loss / d alpha).
    """

    def measure(mine: Sequence[TokenSet], bar: Bar) -> Iterator[Floats]:
        head = OutputHead(replay)
        for row in gate_rows(
            replay,
            mine,
            gate,
            lambda recording, batch, stream, _: loss_gradient(
                recording, batch, stream, label_seed, head
            ),
            advance=bar.advance,
        ):
            yield row.double().cpu().numpy()

    words = f"gradients of {tokens.samples} samples"
    return measure_batches(
        replay, tokens, work, words, measure, gate=gate, label_seed=label_seed
    )


GATE_SLOPES_PASSES = 4.0
"""Cost in forward passes: one of the original, one of the gated model, two for a backward pass."""


def gate_slopes(
    replay: Replay, tokens: TokenSet, state: Bools, batch_tokens: int
) -> Floats:
    """Compute d KL(original || cut) / d alpha of each block's gate at a state: (N,), nats/token.

    For a removed block, the slope is the first-order effect of restoring it, which no measured
    removal shows. For a kept block, it predicts the cost of a removal poorly (docs/experiments.md).

    Args:
        state: (N,) bool; the gates of removed blocks are 0, all others 1.
    """
    total = np.zeros(len(replay))
    batches = tokens.batches(batch_tokens)
    with use_attention(replay):
        for rows in gate_rows(
            replay, batches, "block", divergence_gradient, removed=state
        ):
            total += rows.T.contiguous().sum(1).double().cpu().numpy()
    return total / tokens.tokens
