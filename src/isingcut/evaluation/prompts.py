"""The answers of both models to the user's prompts and twelve fixed ones: whether they end, repeat
themselves, and could be the original's.

A pruned model can keep its scores on multiple choice and no longer stop, or repeat itself
(arXiv 2606.17609). The original answers first; the limit of new tokens is then the power of two
from its longest answer on, so that no answer is cut short that ends as the original's do.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from isingcut.data.conversations import Messages
from isingcut.data.generation import generate_rows, prompt_ids
from isingcut.data.tokens import Row
from isingcut.errors import InputError
from isingcut.evaluation.answers import (
    Text,
    count_repeated,
    generate_texts,
    rate_answers,
)
from isingcut.files.evaluations import Answer, AnswerPair, Answers
from isingcut.formats.architectures.blocks import language_model, text_config
from isingcut.measure.work import Work
from isingcut.models.load import LoadedModel

ANSWERS = "answers to prompts"
"""Name of the part of an evaluation whose texts both models generate."""
NEW_TOKENS = 1024
"""Upper limit of the tokens of each answer to a prompt."""
PLAIN = 64
"""Least limit of new tokens, and the end of an answer in which loops are looked for; all of them
without a chat template, because such a model continues a text without an end."""
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
    original: LoadedModel,
    other: LoadedModel,
    work: Work,
    own: Sequence[Messages] = (),
) -> Answers | None:
    """Return the greedy answers of both models; None if none was possible.

    Prompts that do not fit the model's positions are left out.

    Args:
        work: batch size, progress display, and a journal; finished answers are in files next to it.
        own: the user's prompts, after `check_prompts`.
    """
    tokenizer = original.tokenizer
    most = _most_tokens(original)
    positions = _positions(original)
    prompts: list[str | Messages] = [*own, *PROMPTS]
    # Once for both models, because rendering a chat template starts a process.
    rendered = ((prompt, prompt_ids(tokenizer, prompt)) for prompt in prompts)
    given = [(p, ids) for p, ids in rendered if ids.shape[1] + most <= positions]
    if not given:
        return None
    ids = [ids for _, ids in given]
    before = _answer(original, ids, most, "original", work)
    longest = max(len(row) for _, (row, _) in before)
    limit = min(most, max(PLAIN, 1 << (longest - 1).bit_length()))
    after = _answer(other, ids, limit, "final", work)
    rated = rate_answers(
        original.replay,
        [prompt[0].tolist() for prompt in ids],
        [answer for _, answer in before],
        [answer for _, answer in after],
        work,
    )
    pairs = []
    for (prompt, _), (first, _), (last, _), pair in zip(
        given, before, after, rated, strict=True
    ):
        sides = {
            "before": Answer(text=first, **dict(pair.before)),
            "after": Answer(text=last, **dict(pair.after)),
        }
        pairs.append(AnswerPair(prompt=_show(prompt), **sides))
    chat = bool(tokenizer.chat_template)
    return Answers(limit=limit, own=len(own), chat=chat, pairs=pairs)


def _answer(
    loaded: LoadedModel, ids: Sequence[Tensor], most: int, side: str, work: Work
) -> list[Text]:
    """Return the answers of one model; one that loops is given up."""
    tokenizer: Any = loaded.tokenizer
    model = language_model(loaded.model)

    def write(some: Sequence[int]) -> list[Text]:
        prompts = [ids[k] for k in some]
        rows = generate_rows(model, tokenizer, prompts, most, leave=_is_loop)
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        return [(str(decode(row)).strip(), (row, end)) for row, end in rows]

    prompts = [(tuple(prompt[0].tolist()), {"most": most}) for prompt in ids]
    journal = work.journal and work.journal.with_name(f"answers-{side}.journal")
    return generate_texts(
        loaded.replay, (), prompts, write, replace(work, journal=journal), ANSWERS
    )


def _is_loop(row: Row) -> bool:
    return count_repeated(row[-PLAIN:]) >= 0.5


def check_prompts(loaded: LoadedModel, own: Sequence[Messages]) -> None:
    """Check the user's prompts against the model's template and positions.

    Raises:
        ModelError: the template refuses a prompt, or there is none for its messages.
        InputError: a prompt leaves no room for an answer.
    """
    most = _most_tokens(loaded)
    for number, prompt in enumerate(own, 1):
        tokens = prompt_ids(loaded.tokenizer, prompt).shape[1]
        if tokens + most > _positions(loaded):
            raise InputError(
                f"prompt {number} of --prompts has {tokens} tokens; an answer takes up to {most} "
                f"more, and the model has {_positions(loaded)} positions; shorten the prompt"
            )


def _positions(loaded: LoadedModel) -> int:
    config = text_config(loaded.model)
    return getattr(config, "max_position_embeddings", None) or 10**6


def _most_tokens(loaded: LoadedModel) -> int:
    return NEW_TOKENS if loaded.tokenizer.chat_template else PLAIN


def _show(prompt: str | Messages) -> str:
    """Return a prompt as text, the turns of a longer conversation with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
