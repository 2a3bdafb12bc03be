"""lm-evaluation-harness's model object around a model in memory.

requests of the harness -> which positions are asked about -> logits there and nowhere else
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from isingcut.models.text_alone import text_model

if TYPE_CHECKING:
    from isingcut.console.progress import Bar
    from isingcut.models.load import LoadedModel


class Harness(HFLM):  # type: ignore[misc]
    """The harness's model, showing how far it is; logits end where no answer is scored.

    The harness takes logits of all positions and then looks at those of the answers alone. Here
    they are computed from the first of them in a batch on, by the `logits_to_keep` of transformers'
    models: a question's text, mostly many times as long as its answers, passes no output head.
    """

    def __init__(self, loaded: LoadedModel, batch: int, bar: Bar | None, note: str) -> None:
        model = text_model(loaded.model)
        # In half precision the harness would round log-probabilities, to an eighth from 16 nats on.
        super().__init__(
            pretrained=model,
            tokenizer=loaded.tokenizer,
            batch_size=batch,
            softmax_dtype="float32",
        )
        self.bar, self.note, self.seen = bar, note, 0
        self.answers: dict[bytes, int] = {}
        self.can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **rest: Any) -> Any:
        self.answers = {}
        for _, context, answer in requests:
            # As the harness makes its inputs: cut on the left, without the last token.
            text = _bytes((context + answer)[-(self.max_length + 1) :][:-1])
            self.answers[text] = max(self.answers.get(text, 0), len(answer))
        return super()._loglikelihood_tokens(requests, *args, **rest)

    def _model_call(self, inps: Tensor, *args: Any, **rest: Any) -> Any:
        self.seen += len(inps)
        if self.bar is not None:
            self.bar.advance(0, f"{self.note}: {self.seen} sequences")
        last = positions_asked(inps, self.answers) if self.can_keep else None
        if last is None:
            return super()._model_call(inps, *args, **rest)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=last, use_cache=False).logits


def positions_asked(inputs: Tensor, answers: dict[bytes, int]) -> int | None:
    """How many of the last positions of a batch hold everything that is asked about.

    Args:
        inputs: (n, T) token ids, padded with zeros on the right.
        answers: by the bytes of an unpadded input, the tokens asked about at its end.

    Returns:
        None where a row is none of these inputs.
    """
    most = 0
    for row in inputs.cpu().numpy().astype(np.int32):
        # Zeros at the end may be padding or text: every possible end counts.
        content = int(np.flatnonzero(row)[-1]) + 1 if row.any() else 1
        asked = [
            len(row) - end + answers[text]
            for end in range(content, len(row) + 1)
            if (text := row[:end].tobytes()) in answers
        ]
        if not asked:
            return None
        most = max(most, *asked)
    return most


def _bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype=np.int32).tobytes()
