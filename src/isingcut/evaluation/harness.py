"""lm-evaluation-harness's model object around a model in memory, or read block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from isingcut.evaluation.likelihoods import Answer, Row
from isingcut.models.text_alone import text_model

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel

Answering = Callable[[Sequence[Row]], Sequence[Answer]]


class Harness(HFLM):  # type: ignore[misc]
    """The harness's model, whose likelihoods are ours; it generates as the harness does.

    The harness takes logits of all positions, and in half precision rounds its log-probabilities,
    to an eighth from 16 nats on.

    Args:
        loaded: the model.
        answers: the likelihoods that are asked for.
        batch: sequences that are generated at a time.
        generating: entered while text is generated: what makes the model the one that is asked.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        answers: Answering,
        batch: int = 8,
        generating: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(
            pretrained=text_model(loaded.model),
            tokenizer=loaded.tokenizer,
            batch_size=batch,
            softmax_dtype="float32",
        )
        self.answers, self.generating = answers, generating

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **rest: Any) -> Any:
        # As the harness makes its inputs: cut on the left.
        longest = self.max_length + 1
        rows = [(tuple((c + a)[-longest:]), min(len(a), longest - 1)) for _, c, a in requests]
        return list(self.answers(rows))

    def generate_until(self, *args: Any, **rest: Any) -> Any:
        """As the harness's, of the model that is asked."""
        with self.generating():
            return super().generate_until(*args, **rest)
