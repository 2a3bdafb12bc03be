"""Conversations through a model's chat template, and the assistant's answers in them.

A template may rewrite what it is given (Qwen3 drops the reasoning of earlier turns, Phi ends the
last one otherwise), so that the beginnings of a conversation need not begin the whole. The answers
are found by rendering it once more with marks in their place: what stands around the marks must
give the conversation again, or it is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isingcut.data.tokens import Encoder, Row
from isingcut.errors import CalibrationError, ModelError, first_line

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


Render = Callable[[list[dict[str, Any]]], str]

_FROM, _AT = "isingcut-answer-{}-begins.", "isingcut-answer-{}-is-here."
_END_OF_REASONING = "</think>"
# Tokens before a cut in a text that another ending of the text may change.
_CHANGED = 8


class MarkedText(str):
    """A conversation as text.

    Attributes:
        spans: (first, last) characters of each answer, with the end of its turn.
    """

    spans: tuple[tuple[int, int], ...]


def mark_answers(messages: list[dict[str, Any]], render: Render) -> MarkedText:
    """A conversation through the chat template, and where the assistant's answers are in it.

    Args:
        messages: each with ``role`` and ``content``.
        render: text of messages.

    Raises:
        ModelError: the template refuses the messages, or shows an answer otherwise than as it is.
    """
    whole = MarkedText(render(messages))
    whole.spans = ()
    marked, answers = list(messages), dict[int, str]()
    for i, message in enumerate(messages):
        blank = isinstance(message["content"], str) and not message["content"].strip()
        if message["role"] == "assistant" and not blank:
            answers[i], content = _marked(i, message)
            marked[i] = {**message, "content": content}
    if not answers:
        return whole
    end = max(answers)
    until = [*marked[:end], {**marked[end], "content": marked[end]["content"].rstrip()}]
    end_of_turn = render(until).partition(_AT.format(end))[2]
    text, rest = "", render(marked)
    places = []
    for i, answer in answers.items():
        before, _, rest = rest.partition(_AT.format(i))
        # Reasoning is of the answer where the template shows it as the message has it.
        outside, _, reasoning = before.partition(_FROM.format(i))
        first, text = len(text + outside), text + outside + reasoning + answer
        places.append((i, first, len(text)))
    if text + rest != whole:
        raise ModelError(
            "the model's chat template shows an answer otherwise than the message has it, so the "
            "assistant's tokens cannot be told from the others; give the source without 'answers:'"
        )
    spans = []
    for i, first, last in places:
        content = messages[i]["content"]
        endings = {space + end_of_turn for space in ("", content[len(content.rstrip()) :])}
        more = max(_alike(whole[last:], ending) for ending in endings)
        spans.append((first, last + more))
    whole.spans = tuple(spans)
    return whole


def _marked(i: int, message: Mapping[str, Any]) -> tuple[str, str]:
    """An answer without reasoning and white space around it, and the content with marks for it."""
    content = message["content"]
    if not isinstance(content, str) or message.get("tool_calls"):
        raise ModelError(
            "an answer that is not text alone (a tool call, an image) cannot be counted; give the "
            "source without 'answers:'"
        )
    core = content.strip()
    head, end, rest = core.rpartition(_END_OF_REASONING)
    answer = rest.strip()
    space = rest[: len(rest) - len(answer)]
    before, _, behind = content.partition(core)
    return answer, before + _FROM.format(i) + head + end + space + _AT.format(i) + behind


def row_of(encode: Encoder, text: str, most: int) -> Row:
    """The first tokens of a conversation; of one that is `MarkedText`, its answers alone count.

    A token that is partly an answer's counts where the answer begins, and not where it ends.

    Raises:
        CalibrationError: as `Encoder`; or the tokens of a text depend on what follows far behind.
    """
    if not isinstance(text, MarkedText):
        return encode(text, most)
    ids = encode(text)
    row = [~token for token in ids]
    for first, last in text.spans:
        if first >= last:
            continue
        start, stop = (_tokens_before(encode, text, ids, place) for place in (first, last))
        row[start:stop] = ids[start:stop]
    return row[:most]


def _tokens_before(encode: Encoder, text: str, ids: Sequence[int], place: int) -> int:
    """Tokens that end at or before a place in a text."""
    begin = encode(text[:place])
    found = _alike(begin, ids)
    if len(begin) - found > _CHANGED:
        raise CalibrationError(
            "the model's tokenizer takes a conversation apart otherwise when its end is missing, "
            "so the assistant's tokens cannot be told; give the source without 'answers:'"
        )
    return found


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Members that two begin with both."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
