"""The KL of a model with changed weights, which are made for one block at a time."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from isingcut.data.tokens import TokenSet
from isingcut.formats.architectures.blocks import blocks_in, text_config
from isingcut.ising.states import Floats
from isingcut.measure.splitting import fewer_tokens_to_fit
from isingcut.measure.streams import Kept, check_finite
from isingcut.measure.work import Work
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.device import allowance
from isingcut.models.replay import EMBED, HEAD, Replay, use_attention

Change = Callable[[str, Tensor], Tensor | None]
"""Function from a parameter's name and values to its changed values, or None if unchanged."""


def changed_losses(
    replay: Replay,
    tokens: TokenSet,
    change: Change,
    work: Work,
    description: str,
    removed: Sequence[int] = (),
    kept: Kept | None = None,
    known: Mapping[int, Hashable] | None = None,
) -> Floats:
    """Measure KL(original || changed) of each sample, (m,), summed over its tokens, nats.

    The weights are changed one block at a time, and restored bit for bit. If memory runs out, it
    starts again with smaller micro-batches.

    Args:
        change: function that returns the changed weights.
        removed: removed blocks of the changed model.
        kept: what earlier calls for this text computed, to read and to add to.
        known: keys for the changed model up to some blocks. Calls with the same key have the same
            changes in all earlier blocks.

    Complexity: two forward passes over the tokens, one up to the first change; fewer with those of
    earlier calls.
    """
    paths = {
        block: name
        for name, module in replay.model.named_modules()
        for block in blocks_in(module)
    }
    embedding = replay.text.get_input_embeddings()
    output = replay.text.get_output_embeddings()
    if text_config(replay.model).tie_word_embeddings:
        paths[output] = paths[embedding]

    def changed(module: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
        own = () if module is None else module.named_parameters(prefix=paths[module])
        return [(p, new) for name, p in own if (new := change(name, p)) is not None]

    known = known or {}
    config = text_config(replay.model)
    logits = tokens.tokens * config.vocab_size * embedding.weight.element_size()
    with_logits = kept and 4 * logits <= allowance("", replay.places[-1]).left
    shared = kept is not None
    kept = kept or Kept()

    @torch.no_grad()
    def measure_with(batch_tokens: int) -> Floats:
        batches = tokens.batches(batch_tokens)
        sums = np.zeros(tokens.samples)
        with work.progress(description, len(replay) + 1) as bar, use_attention(replay):
            head = OutputHead(replay)
            recordings = [replay.record(batch.input_ids) for batch in batches]

            def run(block: int, streams: list[Tensor]) -> list[Tensor]:
                pairs = zip(recordings, streams, strict=True)
                return [recording.block(block, stream) for recording, stream in pairs]

            count = len(batches)
            complete = (count, len(replay) - 1) in kept.original
            streams = [recording.entered for recording in recordings]
            others = streams
            for _ in replay.store.sweep([EMBED]):
                if new := changed(embedding):
                    with _swapped(new):
                        others = [replay.record(b.input_ids).entered for b in batches]
            start = 0
            for i, key in sorted(known.items()):
                if complete and (found := kept.find((count, key))):
                    start = i
                    pairs = zip(recordings, found[0], strict=True)
                    others = [r.move_to_block(i, stream) for r, stream in pairs]
            for i in map(int, replay.store.sweep(range(start, len(replay)))):
                if i in known and i > start:
                    kept.keep((count, known[i]), others)
                own = [] if i in removed else changed(replay.blocks[i])
                alike = others is streams and not own and i not in removed
                if (count, i) in kept.original:
                    pairs = zip(recordings, kept.original[count, i], strict=True)
                    streams = [r.move_to_block(i, stream) for r, stream in pairs]
                else:
                    streams = run(i, streams)
                    if shared:
                        kept.keep_original((count, i), streams)
                if alike:
                    others = streams
                elif i not in removed:
                    with _swapped(own):
                        others = run(i, others)
                bar.advance(1)
            for _ in replay.store.sweep([HEAD]):
                new = changed(output)
                ends = zip(batches, recordings, streams, others, strict=True)
                for b, (batch, recording, stream, other) in enumerate(ends):
                    reference = kept.logits.get((count, b)) or Comparison(
                        head.logits(recording, stream, batch), batch
                    )
                    if with_logits:
                        kept.logits[count, b] = reference
                    with _swapped(new):
                        changed_logits = head.logits(recording, other, batch)
                        kl, _ = reference.sum_samples(
                            [reference.compare(changed_logits)]
                        )[:, 0]
                    check_finite(replay, batch, kl)
                    sums[batch.index.numpy()] = kl
            bar.advance(1, f"KL {sums.sum() / tokens.tokens:.4f}")
        return sums

    most = min(work.batch_tokens, replay.limit.tokens)
    longest = int(tokens.mask.sum(1).max())
    return fewer_tokens_to_fit(replay.limit, most, longest, measure_with)


@contextlib.contextmanager
def _swapped(new: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    kept = [parameter.data for parameter, _ in new]
    try:
        for parameter, value in new:
            parameter.data = torch.empty_like(parameter).copy_(value)
        yield
    finally:
        for (parameter, _), data in zip(new, kept, strict=True):
            parameter.data = data
