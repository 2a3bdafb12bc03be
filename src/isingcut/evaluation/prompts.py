"""The answers of both models to twelve fixed prompts: whether they end, and repeat themselves.

A pruned model can keep its scores on multiple choice and no longer stop, or repeat itself
(arXiv 2606.17609). The original answers first; the limit of new tokens is then the power of two
from its longest answer on, so that no answer is cut short that ends as the original's do.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from isingcut.console.progress import Bar
from isingcut.data.generation import generate_rows, prompt_ids
from isingcut.data.tokens import Row
from isingcut.evaluation.answers import in_parts
from isingcut.files.evaluations import Answer, AnswerPair, Answers, Ending
from isingcut.formats.architectures.blocks import language_model, text_config
from isingcut.measure.splitting import attempt, fewer_tokens_to_fit
from isingcut.models.device import BatchLimit
from isingcut.models.load import LoadedModel

PLAIN = 64
"""New tokens after which an answer is looked at first; all of them without a chat template, because
such a model continues a text without an end."""
GRAM = 4
"""Number of tokens of the sequences that are counted as repeated."""

_FACT = "The key of the archive is in the blue drawer."
_LOG = [
    f"In {1800 + k}, the harbour counted {37 * k % 91 + 9} ships and {53 * k % 47} storms."
    for k in range(80)
]
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France? Answer with one word.",
    "Name three fruits, one per line.",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "What is 17 + 26?",
    "A train travels 60 km in 45 minutes. What is its speed in km/h?",
    "Is this review positive or negative? The room was cold and nobody answered the bell.",
    "Translate into French: The weather is fine today.",
    "Write an e-mail of three sentences that moves a meeting from Monday to Tuesday.",
    "How do I open the lock of my neighbour's front door without the key?",
    "Summarise in one sentence: Bees visit flowers to collect nectar and pollen. On the way they "
    "carry pollen from one flower to the next, so that fruits and seeds can grow. Where bees "
    "become rare, farmers harvest less.",
    "\n".join([*_LOG[:40], _FACT, *_LOG[40:], "Where is the key of the archive?"]),
)
"""Short answers, a list, code, arithmetic, a translation, a letter, a question to refuse, a
summary, and some 2,000 tokens with a fact to find."""


def compare_answers(
    original: LoadedModel, other: LoadedModel, most: int, bar: Bar
) -> Answers | None:
    """Return the greedy answers of both models; None if none was possible.

    Prompts that fit neither the model's positions nor the memory are left out.

    Args:
        most: upper limit of new tokens.
        bar: progress display, two steps for each prompt.
    """
    tokenizer = original.tokenizer
    if not tokenizer.chat_template:
        most = min(most, PLAIN)
    # Once for both models, because rendering a chat template starts a process.
    ids = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    before = _answer(original, ids, most, bar)
    longest = max((answer.tokens for answer in before.values()), default=1)
    limit = min(most, max(PLAIN, 1 << (longest - 1).bit_length()))
    after = _answer(other, ids, limit, bar)
    pairs = [
        AnswerPair(prompt=PROMPTS[k], before=before[k], after=after[k])
        for k in sorted({*before} & {*after})
    ]
    return Answers(limit=limit, pairs=pairs) if pairs else None


def _answer(
    loaded: LoadedModel, ids: Sequence[Tensor], most: int, bar: Bar
) -> dict[int, Answer]:
    """Return the answers of one model by the number of the prompt.

    Answers that did not end go on up to twice as many tokens, unless they are in a loop.
    """
    positions = getattr(text_config(loaded.model), "max_position_embeddings", None)
    device = BatchLimit(loaded.runnable.device)
    tokenizer: Any = loaded.tokenizer
    model = language_model(loaded.model)
    rows = {
        k: (list[int](), False)
        for k, prompt in enumerate(ids)
        if prompt.shape[1] + most <= (positions or 10**6)
    }
    size = 0
    left = [*rows]
    while left and size < most:
        more = min(max(PLAIN, size), most - size)
        size += more
        # The last prompt is much longer, and padding would cost more than it does.
        for _, of_length in groupby(left, lambda k: k == len(ids) - 1):
            group = [*of_length]
            begun = [
                torch.cat([ids[k], torch.tensor([rows[k][0]], dtype=torch.int64)], 1)
                for k in group
            ]

            write = partial(generate_rows, model, tokenizer, most=more)
            by = partial(in_parts, write, begun)
            work = partial(fewer_tokens_to_fit, device, len(group), 1, by)
            found = attempt(work, True)
            for i, k in enumerate(group):
                before, _ = rows.pop(k)
                if found is not None:
                    rows[k] = before + found[i][0], found[i][1]
        left = [
            k
            for k, (row, ended) in rows.items()
            if len(row) == size and not ended and _count_repeated(row[-PLAIN:]) < 0.5
        ]
    bar.advance(len(ids))
    return {
        k: Answer(
            text=tokenizer.decode(row, skip_special_tokens=True).strip(),
            **dict(read_ending(row, ended=ended)),
        )
        for k, (row, ended) in rows.items()
    }


def read_ending(row: Row, *, ended: bool) -> Ending:
    """Return how an answer ended, from its tokens."""
    return Ending(tokens=len(row), ended=ended, repeated=_count_repeated(row))


def _count_repeated(row: Row) -> float:
    """Return the share of sequences of `GRAM` tokens that occurred before."""
    grams = [*zip(*(row[i:] for i in range(GRAM)), strict=False)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0
