"""Render conversations by a model's chat template, and find the assistant's tokens.

A template may rewrite messages (Qwen3 drops the reasoning of earlier turns, Phi ends the last turn
differently), so a prefix of the messages need not render to a prefix of the text. The assistant's
messages are found by rendering the conversation again with marks in their place. If the text around
the marks does not reproduce the conversation, an error is raised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.data import text_files
from isingcut.errors import CalibrationError, InputError, ModelError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from isingcut.data.tokens import Encoder, Row


Messages = list[dict[str, Any]]
"""A conversation: turns with ``role`` and ``content``."""


def check_messages(where: str, messages: Any) -> Messages:
    """Return a conversation that a user gave.

    Args:
        where: its place, for messages.

    Raises:
        CalibrationError: it is no list of objects with ``role`` and ``content``.
    """
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and "role" in m and "content" in m for m in messages
        )
    ):
        raise CalibrationError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content'"
        )
    return messages


def read_prompts(file: str, place: Path) -> list[Messages]:
    """Read the prompts of a file: a text with one a line, or records with ``messages`` or ``text``.

    An assistant's turn at the end is left out.

    Args:
        file: the name in messages.

    Raises:
        CalibrationError: as `text_files.read_text`, or a record is no conversation.
        InputError: the file has no prompt, or a conversation no turn of the user at its end.
    """
    text_files.check(place, file, "give a .txt or .jsonl file")
    kind, *records = text_files.read_text(place, file)
    if kind == ".txt":
        lines = map(str.strip, "".join(records).splitlines())
        records = [(file, {"text": line}) for line in lines if line]
    prompts = []
    for where, fields in records:
        given = fields.get(
            "messages", [{"role": "user", "content": fields.get("text")}]
        )
        messages = check_messages(where, given)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            raise InputError(f"{where} must end with a turn of the user")
        if not all(isinstance(m["content"], str) and m["content"] for m in messages):
            raise InputError(f"{where}: the 'content' of each turn must be a text")
        prompts.append(messages)
    if not prompts:
        raise InputError(f"{file} has no prompts; give one a line, or 'messages'")
    return prompts


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> str:
    """Render one conversation as text.

    Args:
        options: options of `apply_chat_template`, for example ``add_generation_prompt``.

    Raises:
        ModelError: the template refuses the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as e:
        # A template is third-party code and may raise anything.
        reason = "".join(c if c.isprintable() else "?" for c in one_line(e))
        raise ModelError(
            f"the model's chat template refuses these messages ({reason})"
        ) from e


Render = Callable[[list[dict[str, Any]]], str]

_FROM = "isingcut-answer-{}-begins."
_AT = "isingcut-answer-{}-is-here."
_END_OF_REASONING = "</think>"
# Maximum number of tokens before a truncation that may depend on the text after it.
_CHANGED = 8


class MarkedText(str):
    """A conversation as text.

    Attributes:
        spans: character range (first, last) of each assistant message, with its end of turn.
    """

    spans: tuple[tuple[int, int], ...] = ()


def mark_answers(messages: list[dict[str, Any]], render: Render) -> MarkedText:
    """Render a conversation by the chat template, and find the assistant's messages in the text.

    Args:
        messages: each with ``role`` and ``content``.
        render: renders messages as text.

    Raises:
        ModelError: the template refuses the messages, or changes an assistant message.
    """
    whole = MarkedText(render(messages))
    marked = list(messages)
    answers = dict[int, str]()
    for i, message in enumerate(messages):
        blank = isinstance(message["content"], str) and not message["content"].strip()
        if message["role"] == "assistant" and not blank:
            answers[i], content = _mark_content(i, message)
            marked[i] = {**message, "content": content}
    if not answers:
        return whole
    end = max(answers)
    until = [*marked[:end], {**marked[end], "content": marked[end]["content"].rstrip()}]
    end_of_turn = render(until).partition(_AT.format(end))[2]
    text = ""
    rest = render(marked)
    places = []
    for i, answer in answers.items():
        before, _, rest = rest.partition(_AT.format(i))
        # Reasoning counts if the template does not change it.
        outside, _, reasoning = before.partition(_FROM.format(i))
        first = len(text + outside)
        text = text + outside + reasoning + answer
        places.append((i, first, len(text)))
    if text + rest != whole:
        raise ModelError(
            "the model's chat template changes an assistant message, so the assistant's tokens "
            "cannot be found; give the source without 'answers:'"
        )
    spans = []
    for i, first, last in places:
        content = messages[i]["content"]
        endings = {
            space + end_of_turn for space in ("", content[len(content.rstrip()) :])
        }
        more = max(_count_common(whole[last:], ending) for ending in endings)
        spans.append((first, last + more))
    whole.spans = tuple(spans)
    return whole


def _mark_content(i: int, message: Mapping[str, Any]) -> tuple[str, str]:
    """Return a message without reasoning and surrounding white space, and the marked content."""
    content = message["content"]
    if not isinstance(content, str) or message.get("tool_calls"):
        raise ModelError(
            "an assistant message with a tool call or an image cannot be counted; give the source "
            "without 'answers:'"
        )
    core = content.strip()
    head, end, rest = core.rpartition(_END_OF_REASONING)
    answer = rest.strip()
    space = rest[: len(rest) - len(answer)]
    before, _, behind = content.partition(core)
    return answer, before + _FROM.format(i) + head + end + space + _AT.format(
        i
    ) + behind


def row_of(encode: Encoder, text: str, most: int) -> Row:
    """Return the first tokens of a conversation; in a `MarkedText`, only the spans count.

    A token that is partly inside a span counts at the start of the span, but not at its end.

    Raises:
        CalibrationError: as `Encoder`, or tokens depend on text far after them.
    """
    if not isinstance(text, MarkedText):
        return encode(text, most)
    ids = encode(text)
    row = [~token for token in ids]
    for first, last in text.spans:
        # Each count tokenizes the text before a position, so stop at the last token that is kept.
        if (start := _tokens_before(encode, text, ids, first)) >= most:
            break
        stop = _tokens_before(encode, text, ids, last)
        row[start:stop] = ids[start:stop]
    return row[:most]


def _tokens_before(encode: Encoder, text: str, ids: Sequence[int], place: int) -> int:
    """Count the tokens that end at or before a position of a text."""
    begin = encode(text[:place])
    common = _count_common(begin, ids)
    if len(begin) - common > _CHANGED:
        raise CalibrationError(
            "the model's tokenizer splits a truncated conversation differently, so the "
            "assistant's tokens cannot be found; give the source without 'answers:'"
        )
    return common


def _count_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
