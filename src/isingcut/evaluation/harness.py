"""The model object of lm-evaluation-harness for a model in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from isingcut.data.conversations import render_chat
from isingcut.data.generation import finite_logits
from isingcut.errors import InputError
from isingcut.evaluation.answers import Continuation, Likelihood, Prompt, Writer
from isingcut.formats.architectures.blocks import language_model

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel

Answering = Callable[[Sequence[Continuation]], Sequence[Likelihood]]
Writing = Callable[[Sequence[Prompt], Writer], list[str]]


class Harness(HFLM):  # type: ignore[misc]
    """The harness's model class with isingcut's log-likelihoods; it generates as the harness does.

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
    """

    def __init__(
        self,
        loaded: LoadedModel,
        answers: Answering,
        texts: Writing,
        *,
        chat: bool = False,
    ) -> None:
        self.chat = chat and bool(loaded.tokenizer.chat_template)
        super().__init__(
            pretrained=language_model(loaded.model),
            tokenizer=loaded.tokenizer,
            softmax_dtype="float32",
            # The template has the special tokens, as in `prompt_ids`.
            add_bos_token=False if self.chat else None,
        )
        self.answers = answers
        self.texts = texts
        self.asked = self.shortened = 0

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

    def _model_generate(self, *args: Any, **rest: Any) -> Any:
        own = finite_logits(self.model)
        return super()._model_generate(*args, **rest, logits_processor=own)

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

        def write(some: Sequence[int]) -> Sequence[str]:
            self.batch_size_per_gpu = len(some)
            texts: list[str] = generate([requests[i] for i in some], disable_tqdm=True)
            return texts

        prompts = [
            (tuple(self.tok_encode(r.args[0])), dict(r.args[1])) for r in requests
        ]
        for ids, settings in prompts:
            most = int(settings.get("max_gen_toks") or self.max_gen_toks or 0)
            room = self.max_length - most
            if room < 1:
                raise InputError(
                    f"a task generates up to {most} tokens, but the model has "
                    f"{self.max_length} positions; choose another task"
                )
            self._count([len(ids)], room)
        return self.texts(prompts, write)
