"""Log-likelihoods of continuations, and generated texts, for many states of one model.

rows of tokens with continuations -> blocks, each node of the states' prefix tree once -> the head,
only at the positions that predict the continuations

Texts are generated for a few prompts at a time, and then stored in the journal. The original's
likelihoods of the answers say which of them it could have given.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.generation import Generated
from isingcut.data.tokens import Row, TokenSet
from isingcut.files.evaluations import Ending, EndingPair
from isingcut.files.journal import Journal
from isingcut.files.results import fingerprint
from isingcut.ising.states import Bools, Floats, States
from isingcut.measure.losses import in_order, walk
from isingcut.measure.splitting import chunks, fewer_tokens_to_fit, split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.work import Work, identity
from isingcut.models.replay import Replay, use_attention

T = TypeVar("T")
Continuation = tuple[tuple[int, ...], int]
"""Token ids, two or more, and the number of tokens of the continuation at the end."""
Likelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether it is the greedy one."""

# Positions per call of the head, whose logits are float32 over the whole vocabulary.
_HEAD_ROWS = 128
# Hidden states of a batch in addition to those of the states: input of the blocks, current output.
_OTHERS = 2


def answer_scores(
    replay: Replay,
    rows: Sequence[Continuation],
    states: npt.ArrayLike,
    work: Work,
    description: str = "log-likelihoods",
) -> tuple[Floats, Bools]:
    """Compute each continuation's log-likelihood under each state, and whether it is greedy.

    Rows that differ only in their last token, such as the letters of one question, run once.

    Args:
        rows: R rows.
        states: (S, N) bool, True where a block is removed.
        work: batch size and progress display; its journal keeps finished micro-batches.
        description: the description of the progress bar.

    Returns:
        (S, R) nats, and (S, R) bool: whether every token of the continuation is the most likely.

    Complexity: a block evaluation per token and node of the states' prefix tree, and a row of the
    head per state and token of a continuation.
    """
    wanted = np.asarray(states, dtype=bool).reshape(-1, len(replay))
    order = in_order(wanted)
    alike: dict[tuple[int, ...], list[int]] = {}
    for r, (ids, _) in enumerate(rows):
        alike.setdefault(tuple(ids[:-1]), []).append(r)
    tokens = TokenSet.from_rows([*alike])
    groups = list(alike.values())
    batches = tokens.batches(work.batch_tokens)

    def rows_of(batch: TokenSet) -> list[tuple[int, int]]:
        """Return (sample, row) of each continuation in a micro-batch."""
        return [
            (i, r) for i, row in enumerate(batch.index.tolist()) for r in groups[row]
        ]

    def compute(some: Sequence[TokenSet]) -> list[Floats]:
        asked = [[(i, rows[r]) for i, r in rows_of(batch)] for batch in some]
        return _scores(replay, some, wanted[order], asked)

    measured = identity(
        replay,
        tokens,
        answers=rows,
        states=np.packbits(wanted).tolist(),
        shape=wanted.shape,
        batch_tokens=work.batch_tokens,
    )
    kept = Journal(work.journal, measured)
    costs = [int(batch.mask.sum()) for batch in batches]
    left = [b for b in range(len(batches)) if kept.get(str(b)) is None]
    with (
        work.progress(description, sum(costs)) as bar,
        torch.inference_mode(),
        use_attention(replay),
    ):
        bar.advance(sum(costs) - sum(costs[b] for b in left))
        waiting = [batches[b] for b in left]
        for chunk, _ in chunks(replay, waiting, len(wanted) + _OTHERS):
            scores = split_to_fit(
                replay.limit,
                waiting[chunk],
                compute,
                lambda a, b: np.concatenate([a, b], -1),
            )
            for b, of_batch in zip(left[chunk], scores, strict=True):
                kept.put({str(b): of_batch})
                bar.advance(costs[b])
    sums = np.zeros((2, len(wanted), len(rows)))
    for b, batch in enumerate(batches):
        sums[:, order[:, None], [r for _, r in rows_of(batch)]] = kept.get(str(b))
    return sums[0], sums[1] == 1


Asked = Sequence[tuple[int, Continuation]]
"""The continuations of a micro-batch, each with the index of its sample."""


def _scores(
    replay: Replay,
    batches: Sequence[TokenSet],
    states: States,
    asked: Sequence[Asked],
) -> list[Floats]:
    """Return (2, S, R) per micro-batch: log-likelihoods and greedy flags under sorted states."""
    recordings = [replay.record(batch.input_ids) for batch in batches]
    scores = [np.zeros((2, len(states), len(rows))) for rows in asked]

    def run(tree: int, block: int, stream: Tensor) -> Tensor:
        return recordings[tree].block(block, stream)

    trees = [(states, recording.entered) for recording in recordings]
    for tree, first, last, end in walk(trees, run, by_block=replay.streamed):
        scores[tree][:, first:last] = read_answers(replay, end, asked[tree])[:, None]
    for batch, rows, of_batch in zip(batches, asked, scores, strict=True):
        samples = batch.select([sample for sample, _ in rows])
        check_finite(replay, samples, of_batch, states)
    return scores


def read_answers(replay: Replay, stream: Tensor, rows: Asked) -> Floats:
    """Return (2, R) log-likelihoods and greedy flags, from the hidden states (B, T, D).

    Only the positions that predict the continuations pass through the final norm and the head.
    """
    # Position t predicts token t + 1, the label.
    places = [
        (sample, t, ids[t + 1], r)
        for r, (sample, (ids, k)) in enumerate(rows)
        for t in range(len(ids) - 1 - k, len(ids) - 1)
    ]
    sample, position, labels, owner = torch.tensor(places).T
    parts = list[Tensor]()
    pieces = (t.split(_HEAD_ROWS) for t in (stream[sample, position], labels))
    for part, label in zip(*pieces, strict=True):
        logits = replay.tail(part[None], label[None].to(replay.device))[0].float()
        label = label.to(logits.device)
        likely = logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(-1)
        parts.append(torch.stack([likely, logits.argmax(-1) == label]).double())
    likely, best = torch.cat(parts, 1).cpu().numpy()
    scores = np.stack([np.zeros(len(rows)), np.ones(len(rows))])
    np.add.at(scores[0], owner.numpy(), likely)
    np.minimum.at(scores[1], owner.numpy(), best)
    return scores


Prompt = tuple[tuple[int, ...], dict[str, Any]]
"""Token ids, and the JSON-able generation settings."""
GRAM = 4
"""Number of tokens of the sequences that are counted as repeated."""


def count_repeated(row: Row) -> float:
    """Return the share of sequences of `GRAM` tokens that occurred before."""
    grams = [*zip(*(row[i:] for i in range(GRAM)), strict=False)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def rate_answers(
    original: Replay,
    prompts: Sequence[Row],
    before: Sequence[Generated],
    after: Sequence[Generated],
    work: Work,
) -> list[EndingPair]:
    """Return how the answers of both models to prompts ended, with their likelihoods.

    Args:
        original: the blocks of the original.
        before, after: the answers of the original and of the other model.
        work: batch size, progress display and journal.
    """
    answers = [*before, *after]
    rows = [
        ((*prompt, *row, *end), len(row) + len(end))
        for prompt, (row, end) in zip([*prompts, *prompts], answers, strict=True)
    ]
    states = np.zeros((1, len(original)), bool)
    found, _ = answer_scores(original, rows, states, work, "likelihoods of answers")
    endings = [
        Ending(
            tokens=len(row),
            ended=bool(end),
            repeated=count_repeated(row),
            likelihood=nats / (len(row) + len(end)),
        )
        for (row, end), nats in zip(answers, found[0].tolist(), strict=True)
    ]
    half = len(before)
    pairs = zip(endings[:half], endings[half:], strict=True)
    return [EndingPair(before=one, after=other) for one, other in pairs]


Text = tuple[str, Generated]
"""A generated text, and its tokens."""
Writer = Callable[[Sequence[int]], Sequence[Text]]
"""Function that generates the texts after some prompts, given by index, in one batch."""

MICRO_BATCHES = 4
"""Factor on the tokens of a batch of prompts, because more texts hardly slow down decoding."""


def generate_texts(
    replay: Replay,
    state: Sequence[int],
    prompts: Sequence[Prompt],
    write: Writer,
    work: Work,
    description: str = "generated texts",
) -> list[Text]:
    """Return one state's generated texts; those in the journal are not generated again.

    Args:
        replay: the model's blocks.
        state: the removed blocks.
        write: function that generates texts with the state.
        work: sets the batch size; its journal keeps finished texts.
        description: the description of the progress bar.
    """
    identity_of = fingerprint([replay.identity(), "tokens", prompts])
    kept = Journal(work.journal, identity_of)
    keys = [f"{[*state]}/{i}" for i in range(len(prompts))]
    left = [i for i, key in enumerate(keys) if kept.get(key) is None]
    left.sort(key=lambda i: -len(prompts[i][0]))
    with work.progress(description, len(prompts)) as bar:
        bar.advance(len(prompts) - len(left))
        while left:
            longest = max(1, len(prompts[left[0]][0]))
            count = max(1, MICRO_BATCHES * work.batch_tokens // longest)
            some = left[:count]
            del left[:count]
            write_by = partial(in_parts, write, some)
            texts = fewer_tokens_to_fit(replay.limit, len(some), 1, write_by)
            # The journal stores arrays: counts, tokens, and a number per byte of the text.
            codes = (
                np.array([len(row), len(end), *row, *end, *text.encode()], np.float64)
                for text, (row, end) in texts
            )
            kept.put(dict(zip((keys[i] for i in some), codes, strict=True)))
            bar.advance(len(some))
    return [_read_text(row) for row in map(kept.get, keys) if row is not None]


def in_parts(
    write: Callable[[Sequence[Any]], Sequence[T]], items: Sequence[Any], count: int
) -> list[T]:
    """Return what a function returns for items, at most ``count`` of them at a time."""
    starts = range(0, len(items), count)
    return [one for a in starts for one in write(items[a : a + count])]


def _read_text(codes: Floats) -> Text:
    tokens, ends, *rest = codes.astype(np.int64).tolist()
    text = bytes(rest[tokens + ends :]).decode()
    return text, (rest[:tokens], rest[tokens : tokens + ends])
