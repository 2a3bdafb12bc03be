"""The model object of lm-evaluation-harness for a model in memory or streamed."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from isingcut.data.conversations import render_chat
from isingcut.data.generation import Generated, end_tokens, finite_logits, split_end
from isingcut.errors import InputError
from isingcut.evaluation.answers import (
    Continuation,
    Likelihood,
    Prompt,
    Text,
    Writer,
)
from isingcut.formats.architectures.blocks import language_model
from isingcut.models.load import LoadedModel

Answering = Callable[[Sequence[Continuation]], Sequence[Likelihood]]
Writing = Callable[[Sequence[Prompt], Writer], list[Text]]
MOST = 1024
"""Limit of new tokens of tasks that have none; the harness's is 256, which cuts answers short."""


class Harness(HFLM):  # type: ignore[misc]
    """The harness's model class with isingcut's log-likelihoods; it generates as the harness does,
    but notes which answers ended.

    The harness's own log-likelihoods need the logits of all positions, and are rounded in half
    precision: to multiples of 1/8 from 16 nats on.

    Args:
        loaded: the model.
        answers: function that computes log-likelihoods.
        texts: function that returns generated texts, given prompts and a function that generates
            the texts of some of them.
        chat: whether prompts are chat turns, if the tokenizer has a chat template.

    Attributes:
        asked: number of prompts so far.
        shortened: number of prompts that were longer than the model's positions.
        written: the tokens of each prompt, and of the answer to it, by prompt.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        answers: Answering,
        texts: Writing,
        *,
        chat: bool = False,
    ) -> None:
        tokenizer: Any = loaded.tokenizer
        self.chat = chat and bool(tokenizer.chat_template)
        if not (tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token):
            # The harness would add a token that the model does not have.
            tokenizer.pad_token_id = 0
        super().__init__(
            pretrained=language_model(loaded.model),
            tokenizer=tokenizer,
            softmax_dtype="float32",
            # The template has the special tokens, as in `prompt_ids`.
            add_bos_token=False if self.chat else None,
        )
        self.answers = answers
        self.texts = texts
        self.asked = self.shortened = 0
        self.written: dict[str, tuple[list[int], Generated]] = {}
        self._of_rows: list[Generated] = []
        self.cache_hook: Any = self

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **rest: Any) -> Any:
        # Truncated on the left, as in the harness.
        longest = self.max_length + 1
        self._count([len(c + a) for _, c, a in requests], longest)
        rows = [
            (tuple((c + a)[-longest:]), min(len(a), longest - 1))
            for _, c, a in requests
        ]
        return list(self.answers(rows))

    def _count(self, lengths: Sequence[int], longest: int) -> None:
        self.asked += len(lengths)
        self.shortened += sum(length > longest for length in lengths)

    @property
    def max_gen_toks(self) -> int:
        """Limit of new tokens of tasks that have none."""
        return min(MOST, int(self.max_length) // 2)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Decode tokens; the harness gives None for the end token of a model without one."""
        return (
            None if tokens is None else super().tok_decode(tokens, skip_special_tokens)
        )

    def limits(self, settings: dict[str, Any]) -> tuple[int, int]:
        """Return the most new tokens by generation settings, and the positions left for a prompt.

        Raises:
            InputError: the model has too few positions.
        """
        most = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        if most >= self.max_length:
            raise InputError(
                f"it generates up to {most} tokens, but the model has {self.max_length} "
                "positions; choose another task"
            )
        return most, self.max_length - most

    def _model_generate(self, context: Any, stop: list[str], **rest: Any) -> Any:
        own = finite_logits(self.model)
        made = super()._model_generate(
            context=context, stop=stop, **rest, logits_processor=own
        )
        ends = end_tokens(self.model, self.tokenizer)
        for whole in made[:, context.shape[1] :].tolist():
            row, end = split_end(whole, ends)
            # The rows of a batch go on until all have stopped.
            stops = partial(self._has_any, stop, row)
            if stops(len(row)):
                last = bisect_left(range(len(row)), True, key=stops) - 1
                row, end = row[:last], row[last : last + 1]
            self._of_rows.append((row, end))
        return made

    def _has_any(self, terms: Sequence[str], row: list[int], count: int) -> bool:
        """Whether the first tokens of an answer have a text at which it stops."""
        text = self.tok_decode(row[:count])
        # As the harness, which ignores empty ones.
        return any(term in text for term in terms if term)

    def add_partial(self, kind: str, request: tuple[str, Any], text: str) -> None:
        """Note the tokens of an answer; the harness reports each, in the order of its batch."""
        if kind == "generate_until":
            self.written[request[0]] = [], self._of_rows.pop(0)

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, as `render_chat`."""
        return render_chat(
            self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests: Any, *args: Any, **rest: Any) -> Any:
        """Generate as the harness does, in batches that `texts` chooses."""
        generate = super().generate_until

        def write(some: Sequence[int]) -> list[Text]:
            self.batch_size_per_gpu = len(some)
            texts = generate([requests[i] for i in some], disable_tqdm=True)
            rows = [self.written[requests[i].args[0]][1] for i in some]
            return [*zip(texts, rows, strict=True)]

        prompts = []
        for context, own in (r.args for r in requests):
            ids = tuple(self.tok_encode(context))
            most, room = self.limits(own)
            prompts.append((ids, {**own, "max_gen_toks": most}))
            self._count([len(ids)], room)
        found = self.texts(prompts, write)
        for request, (ids, how), (_, made) in zip(
            requests, prompts, found, strict=True
        ):
            room = self.max_length - how["max_gen_toks"]
            self.written[request.args[0]] = [*ids[-room:]], made
        return [text for text, _ in found]
