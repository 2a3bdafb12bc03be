"""Conversations through a model's chat template, in the sandbox of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isingcut.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> str:
    """The text of one conversation.

    Args:
        options: those of `apply_chat_template`, for example ``add_generation_prompt``.

    Raises:
        ModelError: the template refuses the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as e:
        # A template is a program that somebody else wrote; it may fail in any way.
        said = "".join(c if c.isprintable() else "?" for c in first_line(e)[:300])
        raise ModelError(f"the model's chat template refuses these messages ({said})") from e
