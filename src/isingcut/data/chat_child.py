"""`python -m isingcut.data.chat_child SECONDS BYTES`: the process that renders chat templates.

Reads lines of JSON from its parent (the template and the special tokens, then a conversation at a
time) and answers each with one. Rendering is transformers' own, and torch is not loaded.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from types import SimpleNamespace
from typing import Any

from isingcut.data.chat_templates import LONGEST
from isingcut.errors import first_line


def main(arguments: list[str]) -> None:
    """Serve until the parent closes the pipe; die at the limit of time for one conversation."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    seconds, memory = float(arguments[0]), int(arguments[1])
    _limit(memory)
    template, special = json.loads(sys.stdin.readline())
    # All that the method needs of a tokenizer, whose class may need torch or its files.
    tokenizer: Any = SimpleNamespace(
        get_chat_template=lambda *_: template, special_tokens_map=special
    )
    for line in sys.stdin:
        messages, options = json.loads(line)
        _timer(seconds)
        try:
            text = PreTrainedTokenizerBase.apply_chat_template(
                tokenizer, messages, tokenize=False, **options
            )
            answer = {"text": str(text)}
            if len(answer["text"]) > LONGEST:
                answer = {"error": f"it makes more than {LONGEST} characters of them"}
        except MemoryError:
            answer = {"error": f"it needs more than {memory >> 20} MB of memory"}
        except Exception as e:
            said = first_line(e)[:300]
            answer = {"error": "".join(c if c.isprintable() else "?" for c in said)}
        _timer(0)
        print(json.dumps(answer), flush=True)


def _limit(memory: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    # macOS does not let this limit be set.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))


def _timer(seconds: float) -> None:
    """Let the system end this process after so much computing, wherever it is then."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
