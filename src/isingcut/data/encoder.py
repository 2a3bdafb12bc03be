"""The one place where text becomes token ids: in pieces of bounded size, and checked.

A tokenizer needs some 300 bytes for every character that it is given at a time; a longer text is
cut before white space, where tokenizers of words cut anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from isingcut.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 1 << 20
"""Characters that are tokenised at a time."""

_NEAR = 1 << 16
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")


def cut(text: str) -> int:
    """Where a text that goes on ends well: before its last white space, if that is near its end."""
    tail = max(1, len(text) - _NEAR)
    found = _LAST_SPACE.search(text, tail)
    return found.start() if found else len(text)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `LONGEST` characters; a shorter one is whole."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + cut(text[start : start + LONGEST])
        yield text[start:end]
        start = end
    yield text[start:]


class Encoder:
    """A tokenizer, and how many tokens the model it is used with knows.

    Args:
        tokenizer: any of transformers.
        model: its embedding's rows bound the token ids; None bounds them by nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._rows = None if model is None else _rows(model)

    def __call__(self, text: str, most: int | None = None) -> list[int]:
        """The token ids of a text, without special ones around it.

        Args:
            most: leave off what comes after so many tokens.

        Raises:
            CalibrationError: the tokenizer cannot take the text, or the model a token of it.
        """
        ids: list[int] = []
        for piece in pieces(text):
            ids += self.checked(_ids(self.tokenizer, piece, special=False))
            if most is not None and len(ids) >= most:
                return ids[:most]
        return ids

    def checked(self, ids: list[int]) -> list[int]:
        """``ids`` themselves, if the model's embedding has a row for each.

        Raises:
            CalibrationError: names the token that it lacks.
        """
        largest = max(ids, default=0)
        if self._rows is not None and largest >= self._rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise CalibrationError(
                f"the tokenizer gives the text a token {token!r} with number {largest}, but the "
                f"model's embedding has only {self._rows} rows: the token was added to the "
                "tokenizer and not to the model. Resize the model "
                "(model.resize_token_embeddings(len(tokenizer)), then save it), use the tokenizer "
                "it was trained with, or choose text without that token"
            )
        return ids

    @property
    def start(self) -> list[int]:
        """``[BOS]`` where the tokenizer starts every text with it, else empty."""
        bos = self.tokenizer.bos_token_id
        begins = bos is not None and _ids(self.tokenizer, "a", special=True)[:1] == [bos]
        return self.checked([bos]) if begins else []

    @property
    def separator(self) -> list[int]:
        """What stands between documents that are packed together: an empty line."""
        return self("\n\n")

    @property
    def pad(self) -> int:
        """The token that fills a batch up; no result depends on it."""
        pad = self.tokenizer.pad_token_id
        # Fine-tunes often add one that the model has no row for.
        return 0 if pad is None or (self._rows is not None and pad >= self._rows) else int(pad)


def _rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding, whose weights may be on disk still."""
    embedding: Any = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    try:
        # verbose=False: a text longer than the model's context is cut into samples afterwards.
        ids: Iterable[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except MemoryError:
        raise
    except BaseException as e:
        # A panic of the tokenizers library, which is written in Rust, is no `Exception`.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise CalibrationError(
            f"the model's tokenizer fails on the text {shown!r} ({first_line(e)}); its "
            "tokenizer.json is damaged or of another version: use the one it was published with"
        ) from e
    return list(ids)
