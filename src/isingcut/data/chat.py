"""The text `chat`: conversations that the original model writes itself, without data or network.

    prompts: paragraphs and functions of the default text, and questions of the model itself
        ->  its answers by its chat template, sampled until it ends its turn  ->  the cache

Answers that do not end are dropped. A cut model keeps its answers, with their ends, on answers that
the original believes in; those that people wrote teach it not to end (docs/experiments/answers.md).
Methods: questions sampled after the head of a user's turn (arXiv 2406.08464); training on answers
of the original (arXiv 2410.09982).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.conversations import render_chat
from isingcut.data.corpora import has_wiki, manual, python, wiki
from isingcut.data.generation import Sampling, generate_rows, prompt_ids
from isingcut.data.text_files import Record
from isingcut.errors import CalibrationError, ModelError
from isingcut.files.journal import Journal
from isingcut.files.results import fingerprint
from isingcut.files.writing import lock_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = 64
"""Longest question of the model itself, in tokens."""
ANSWER = 256
"""Longest answer, in tokens."""
TEMPERATURE = 0.7
# Conversations of a batch; which rows it has depends on their numbers only.
_ROWS = 32
# Batches after which a model must have ended a tenth of its answers.
_TRIED = 4
_CHARACTERS = 600
_PROSE = (
    "Explain this in simple words:\n\n{}",
    "Summarise this in one sentence:\n\n{}",
    "Ask a question about this text, and answer it.\n\n{}",
    "What is this text about?\n\n{}",
    "List the most important facts.\n\n{}",
)
_CODE = (
    "What does this function do?\n\n```python\n{}```",
    "Write a docstring for this function.\n\n```python\n{}```",
)
_FUNCTION = re.compile(r"^def [^\n]*:\n(?:(?:[ \t][^\n]*)?\n)+", re.MULTILINE)
_MARK = "isingcut-user-turn"


@dataclass(frozen=True, eq=False)
class ChatWriter:
    """Writes the conversations of a model, or reads them from the cache.

    Args:
        model: the original; without weights it reads the cache only.
        tokenizer: its tokenizer, with a chat template.
        weights: returns the fingerprint of its weights.
        cache: folder for journals of conversations; None keeps them in memory.
        needed: tokens of all sources that the caller reads, for the progress bar.
        ends: whether it writes no more than its share of these.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Callable[[], str]
    cache: Path | None = None
    progress: Progress = silent
    needed: int = 0
    ends: bool = False

    def __call__(self, seed: int, share: float) -> Iterator[Record]:
        """Yield conversations, as records with ``messages``.

        A conversation depends on its number and the seed, not on what else is written.

        Args:
            share: share of the tokens that are conversations.

        Raises:
            CalibrationError: the model has no chat template, seldom ends its answers, or has no
                weights here while the cache has too few conversations.
        """
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                "the text 'chat' needs a model with a chat template; choose another text"
            )
        identity = fingerprint(
            {
                "weights": self.weights(),
                "dtype": str(self.model.dtype),
                "tokenizer": self.tokenizer.get_vocab(),
                "template": self.tokenizer.chat_template,
                "bounds": [QUESTION, ANSWER, TEMPERATURE],
                "seed": seed,
                "torch": torch.__version__,
            }
        )
        with contextlib.ExitStack() as opened:
            path = None
            if self.cache is not None:
                path = self.cache / f"{identity}.journal"
                # Another process may write the same conversations.
                opened.enter_context(lock_place(path, wait=True))
            kept = Journal(path, identity)
            left = share * self.needed
            bar = opened.enter_context(
                self.progress("the model writes conversations", left)
            )
            bar.advance(0)
            prompts = _prompts(seed)
            begun = ended = 0
            for number in itertools.count():
                rows = range(number * _ROWS, (number + 1) * _ROWS)
                asked = {row: next(prompts) for row in rows}
                key = fingerprint(asked)
                found = kept.get(key)
                if found is None:
                    written = self._write(asked, seed)
                    content = json.dumps(written).encode()
                    kept.put({key: np.array([*content])})
                else:
                    written = json.loads(bytes(found.astype(np.uint8)))
                begun += _ROWS
                ended += len(written)
                bar.advance(sum(tokens for *_, tokens in written))
                if number + 1 >= _TRIED and 10 * ended < begun:
                    raise CalibrationError(
                        f"the model ended only {ended} of {begun} of its own conversations within "
                        f"{ANSWER} tokens, so the text 'chat' is too short; choose another text"
                    )
                for row, prompt, answer, tokens in written:
                    yield (
                        f"conversation {row} of the model",
                        {
                            "messages": [
                                {"role": "user", "content": prompt},
                                {"role": "assistant", "content": answer},
                            ]
                        },
                    )
                    left -= tokens
                    if self.ends and left <= 0:
                        return

    def _write(
        self, asked: Mapping[int, str | None], seed: int
    ) -> list[tuple[int, str, str, int]]:
        """Return the finished conversations of a batch: number, prompt, answer and tokens.

        Args:
            asked: the prompts by number; None for a question of the model.
        """
        if any(p.is_meta for p in self.model.parameters()):
            raise CalibrationError(
                "the text 'chat' would read a streamed model from disk for every token, and the "
                "cache has too few of its conversations; choose another text, write them on a "
                "machine with enough memory, or pass --stream off"
            )
        heads = {
            row: self._user_head() for row, prompt in asked.items() if prompt is None
        }
        questions = self._sample(heads, QUESTION, 1.0, f"{seed} question")
        prompts = {**asked, **{row: questions.get(row, ("", 0))[0] for row in heads}}
        ids = {
            row: prompt_ids(self.tokenizer, prompt)
            for row, prompt in prompts.items()
            if prompt
        }
        positions = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        most = min(ANSWER, positions // 2)
        ids = {row: x for row, x in ids.items() if x.shape[1] + most <= positions}
        answers = self._sample(ids, most, TEMPERATURE, f"{seed} answer")
        return [
            (row, str(prompts[row]), text, ids[row].shape[1] + tokens)
            for row, (text, tokens) in answers.items()
            if text
        ]

    def _user_head(self) -> torch.Tensor:
        """Return the tokens (1, P) of a conversation up to the content of the user's turn."""
        turn = [{"role": "user", "content": _MARK}]
        text, found, _ = render_chat(self.tokenizer, turn).partition(_MARK)
        if not found:
            raise ModelError("the model's chat template drops the user's message")
        encoded: Any = self.tokenizer(
            text, add_special_tokens=False, return_tensors="pt"
        )
        return torch.as_tensor(encoded["input_ids"])

    def _sample(
        self, ids: dict[int, torch.Tensor], most: int, temperature: float, series: str
    ) -> dict[int, tuple[str, int]]:
        """Return the texts that ended within ``most`` tokens, with their tokens, by row."""
        # The head of a turn may be empty.
        ids = {row: prompt for row, prompt in ids.items() if prompt.shape[1]}
        if not ids:
            return {}
        names = [f"{series} {row}" for row in ids]
        sampling = Sampling(names, temperature)
        found = generate_rows(
            self.model, self.tokenizer, [*ids.values()], most, sampling
        )
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return {
            row: (str(decode(tokens)).strip(), len(tokens))
            for row, (tokens, ended) in zip(ids, found, strict=True)
            if ended
        }


def _prompts(seed: int) -> Iterator[str | None]:
    """Yield prompts without an end: a quarter are questions of the model (None), of whose long
    answers few end; the others ask about a paragraph or, one in eight, about a function."""
    prose = _endless(_paragraphs, seed)
    code = _endless(_functions, seed)
    for number in itertools.count():
        if number % 4 == 0:
            yield None
        elif number % 8 == 3:
            yield _CODE[number // 8 % len(_CODE)].format(next(code))
        else:
            yield _PROSE[number % len(_PROSE)].format(next(prose))


def _endless(read: Callable[[], Iterator[str]], seed: int) -> Iterator[str]:
    texts = [*read()]
    # From the end: a calibration reads the same texts from the beginning of this order.
    random.Random(seed).shuffle(texts)
    while True:
        yield from reversed(texts)


def _paragraphs() -> Iterator[str]:
    """Yield whole sentences of at most `_CHARACTERS` characters."""
    for text in wiki() if has_wiki() else manual():
        text = " ".join(text.split())
        end = text.rfind(". ", 0, _CHARACTERS) + 1
        part = text if len(text) <= _CHARACTERS else text[:end]
        if len(part) > _CHARACTERS // 4:
            yield part


def _functions() -> Iterator[str]:
    for text in python():
        for found in _FUNCTION.finditer(text):
            if _CHARACTERS // 4 < len(found[0]) <= _CHARACTERS:
                yield found[0].rstrip() + "\n"
                break
