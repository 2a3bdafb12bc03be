"""Generate text with explicit settings instead of the checkpoint's generation config."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.conversations import render_chat
from isingcut.data.tokens import Encoder, Row, distinct
from isingcut.errors import NOT_FINITE, CalibrationError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Generated = tuple[Row, Row]
"""The tokens of a generated text, and the token that ended it, if any."""
# New tokens after which rows that have ended leave a batch.
_STEP = 64


def finite_logits(model: PreTrainedModel) -> list[Callable[..., torch.Tensor]]:
    """Return logits processors for `generate` that raise if logits are not finite.

    Single logits may be minus infinity, from masks.
    """

    def refuse(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(-1).isfinite().all():
            raise ModelError(
                f"the logits of {model.name_or_path} are NaN or infinite at token "
                f"{input_ids.shape[1]} of a generated text; {NOT_FINITE}"
            )
        return scores

    return [refuse]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]
) -> torch.Tensor:
    """Tokenize a prompt to (1, P): messages, or a text, which is a chat turn if there is a chat
    template.

    Raises:
        ModelError: the template refuses the messages, or there is none for them.
    """
    chat = bool(tokenizer.chat_template)
    if isinstance(prompt, str) and not chat:
        text = prompt
    else:
        turn = [{"role": "user", "content": prompt}]
        messages = turn if isinstance(prompt, str) else prompt
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
    encoded: Any = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")
    return torch.as_tensor(encoded["input_ids"])


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int,
    processors: list[Callable[..., torch.Tensor]] | None,
    given: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Any:
    """Generate after a prompt (B, P) with these generation settings only.

    `generate` takes missing settings from the model's generation config (end token, top-k,
    repetition penalty), so that is replaced during the call.

    Args:
        given: further arguments of `generate`, such as the mask (B, P) of a padded prompt.

    Returns:
        what `generate` returns, with ``sequences`` (B, P + n) and ``past_key_values``.
    """
    from transformers import GenerationConfig

    generative: Any = model
    own = generative.generation_config
    factory: Any = GenerationConfig
    generative.generation_config = factory(
        use_cache=True, return_dict_in_generate=True, **settings
    )
    try:
        return generative.generate(
            prompt,
            max_new_tokens=new_tokens,
            logits_processor=processors,
            **{"attention_mask": torch.ones_like(prompt), **given},
        )
    finally:
        generative.generation_config = own


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a generated text; none for a model without an end token."""
    own: Any = model.generation_config
    end: Any = own.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    if isinstance(end, list):
        return end
    return [] if end is None else [end]


@dataclass(frozen=True)
class Sampling:
    """How the next tokens of rows are sampled: by a random number of a row's name and its position.

    A row does not depend on the others of its batch.

    Args:
        names: a name for each row.
        temperature: divides the logits.
    """

    names: Sequence[str]
    temperature: float

    def processor(self, rows: Sequence[int], width: int) -> Callable[..., torch.Tensor]:
        """Return a logits processor that leaves the sampled tokens only.

        Args:
            rows: the rows of the batch.
            width: tokens of their prompts, padded.
        """

        def draw(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = input_ids.shape[1] - width
            numbers = [random.Random(f"{self.names[i]} {place}").random() for i in rows]
            sums = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
            level = torch.tensor(numbers, dtype=sums.dtype, device=sums.device)[:, None]
            token = torch.searchsorted(sums, level * sums[:, -1:])
            only = token.clamp(max=scores.shape[1] - 1)
            return torch.full_like(scores, -torch.inf).scatter(1, only, 0.0)

        return draw


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[torch.Tensor],
    most: int,
    sampling: Sampling | None = None,
    leave: Callable[[Row], bool] = lambda row: False,
) -> list[Generated]:
    """Generate continuations of prompts, each (1, P), in one batch padded on the left.

    Rows that have ended leave the batch.

    Args:
        sampling: how to sample; None generates the greedy continuations.
        leave: whether an unfinished row is given up, looked at every `_STEP` tokens.

    Returns:
        for each prompt at most ``most`` tokens up to an end token.
    """
    ends = end_tokens(model, tokenizer)
    width = max(prompt.shape[1] for prompt in prompts)
    padding = ends[0] if ends else 0
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - prompt.shape[1] :] = prompt
        mask[i, width - prompt.shape[1] :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    found = [(list[int](), list[int]()) for _ in prompts]
    left = [*range(len(prompts))]
    cache = dict[str, Any]()
    while left and ids.shape[1] < width + most:
        processors = finite_logits(model)
        if sampling is not None:
            processors.append(sampling.processor(left, width))
        out = _generate(
            model,
            ids,
            min(_STEP, width + most - ids.shape[1]),
            processors,
            {"attention_mask": mask, **cache},
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=padding,
        )
        new = [split_end(row, ends) for row in out.sequences[:, width:].tolist()]
        for i, row in zip(left, new, strict=True):
            found[i] = row
        stay = [k for k, (row, end) in enumerate(new) if not (end or leave(row))]
        left = [left[k] for k in stay]
        if left:
            ids = out.sequences[stay]
            mask = torch.nn.functional.pad(
                mask, (0, ids.shape[1] - mask.shape[1]), value=1
            )
            mask = mask[stay]
            cache = _keep_rows(out, stay)
    return found


def _keep_rows(out: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of the cache that `generate` returned, by its name; none if it cannot be
    divided, so that the prompts are read again."""
    for name in ("cache", "past_key_values"):
        cache: Any = out.get(name)
        if hasattr(cache, "batch_select_indices"):
            with contextlib.suppress(AttributeError, NotImplementedError):
                cache.batch_select_indices(torch.tensor(rows))
                return {name: cache}
    return {}


def split_end(row: Row, ends: Collection[int]) -> Generated:
    """Return a generated row before its first end token, and this token, if any."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop], row[stop : stop + 1]


def decode_tokens(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int
) -> torch.Tensor:
    """Generate exactly ``new_tokens`` greedy tokens after ``prompt`` (B, P), past end tokens."""
    out = _generate(model, prompt, new_tokens, None, do_sample=False, pad_token_id=0)
    return torch.as_tensor(out.sequences[:, prompt.shape[1] :])


_ROWS = 32
_ATTEMPTS = 4


def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
    length: int,
    seed: int,
    progress: Progress = silent,
) -> Iterator[Row]:
    """Sample distinct rows of exactly ``length`` tokens, at temperature 1 from BOS.

    Sampling continues past end-of-sequence tokens, as in packed text. The sequence of samples
    depends on the model and the seed only. Cost: ``length`` cached decoding steps per 32 samples.

    Args:
        needed: maximum number of samples that the caller reads.

    Raises:
        CalibrationError: the tokenizer has no start token, or the model repeats itself.
    """
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in ends if token is not None), None)
    if start is None:
        raise CalibrationError(
            "the source 'self' needs a tokenizer with a BOS or EOS token; choose another "
            "--calibration"
        )
    Encoder(tokenizer, model).check_ids([start])
    batches = -(-needed // _ROWS)
    number = 0
    prompt = torch.full((_ROWS, 1), start, dtype=torch.int64, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    sampling: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    processors = finite_logits(model)
    with progress("sampling text from the model", batches) as bar:

        def sample_rows() -> Iterator[list[int]]:
            for batch in range(_ATTEMPTS * batches):
                with torch.random.fork_rng(devices):
                    torch.manual_seed(seed * 1_000_003 + batch)
                    out = _generate(
                        model,
                        prompt,
                        length - 1,
                        processors,
                        pad_token_id=start,
                        **sampling,
                    )
                yield from out.sequences.tolist()
                bar.advance(1)

        for number, row in enumerate(distinct(sample_rows()), 1):  # noqa: B007
            yield row
    raise CalibrationError(
        f"the model repeats itself: sampling gave {number} different samples of {length} tokens, "
        f"but {needed} are needed; raise --length or choose another --calibration"
    )
