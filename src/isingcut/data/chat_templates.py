"""Conversations through a model's chat template, which is a program somebody else wrote.

It is rendered by a process of its own (`chat_child`) with limits of time and memory, because
neither a loop nor a multiplied string can be stopped within this one. One process serves all the
conversations of a corpus; it takes about a second to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from isingcut.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""Time of computing that one conversation may take."""
MEMORY = 1 << 30
"""Bytes of address space of the process."""
LONGEST = 1 << 24
"""Characters that a rendered conversation may have."""

_REFUSES = "the model's chat template refuses these messages"


class Renderer:
    """A tokenizer's `apply_chat_template`, within limits; a context that ends the process.

    A tokenizer class with a method of its own runs no template, and is called as it is.
    Windows knows no such limits; there the process has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __call__(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of one conversation.

        Args:
            options: those of `apply_chat_template`, for example ``add_generation_prompt``.

        Raises:
            ModelError: the template refuses the messages, or does not keep within the limits.
        """
        from transformers import PreTrainedTokenizerBase

        own = type(self._tokenizer).apply_chat_template
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            try:
                rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception as e:
                raise ModelError(f"{_REFUSES} ({first_line(e)})") from e
            return str(rendered)
        answer = self._asked((messages, options))
        if "text" in answer:
            return str(answer["text"])
        raise ModelError(f"{_REFUSES} ({answer['error']})")

    def _asked(self, request: Any) -> dict[str, Any]:
        child = self._child or self._started()
        self._child = child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(_line(request))
            child.stdin.flush()
        except (TypeError, ValueError, RecursionError) as e:
            raise ModelError(f"{_REFUSES}: they hold more than plain values") from e
        except BrokenPipeError:
            pass
        line = child.stdout.readline()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise ModelError(_death(child.wait()))

    def _started(self) -> subprocess.Popen[bytes]:
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError as e:
            raise ModelError(f"the model's chat template is unusable: {first_line(e)}") from e
        child = subprocess.Popen(
            # -P: nothing in the working folder is imported.
            [sys.executable, "-P", "-m", "isingcut.data.chat_child", f"{SECONDS}", f"{MEMORY}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                # Each thread would take address space.
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(_line((template, _plain(self._tokenizer.special_tokens_map))))
        return child


def _line(value: Any) -> bytes:
    # Escaped, so that half a surrogate pair in a record goes over as it is. What is beyond JSON, a
    # date in a data set for example, is what transformers gives its templates of it.
    return (json.dumps(value, default=lambda v: f"<{type(v).__name__}>") + "\n").encode("ascii")


def _plain(tokens: dict[str, Any]) -> dict[str, Any]:
    """Special tokens as strings, or lists of them."""
    return {k: [str(t) for t in v] if isinstance(v, list) else str(v) for k, v in tokens.items()}


def _death(code: int) -> str:
    if code == -getattr(signal, "SIGPROF", 0):
        return (
            f"the model's chat template did not end within {SECONDS:g} seconds of computing; "
            "repair chat_template in its tokenizer_config.json or chat_template.jinja"
        )
    return (
        f"the process that renders the model's chat template ended unexpectedly (status {code}); "
        "the template or the machine has a fault: repair chat_template, or give plain text"
    )
