"""Third-party loaders, kept quiet; whatever they raise becomes one clear line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from isingcut.errors import IsingcutError, ModelError

_LONGEST = 300
# What these say is a sentence; other errors are little without their name.
_SPEAKING = (OSError, ValueError, RuntimeError, ImportError)


@contextlib.contextmanager
def loading(what: str, error: type[IsingcutError] = ModelError) -> Iterator[None]:
    """Turn all that a library raises meanwhile into one error that says what was read.

    A configuration, a tokenizer or a file that others wrote can make a library fail in any way.

    Args:
        what: what is read, for example ``"the tokenizer in my-model"``.
        error: the kind of error that is raised.

    Raises:
        error: the library failed; our own errors pass.
    """
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except IsingcutError:
        raise
    except Exception as e:
        if "trust_remote_code=True" in str(e):
            raise error(
                f"cannot load {what}: it needs Python code of its own, which runs only if you "
                "trust it; read its .py files, then pass --trust-remote-code"
            ) from e
        raise error(f"cannot load {what}: {one_line(e)}") from e
    except BaseException as e:
        # A panic of a library written in Rust is no `Exception`.
        if type(e).__name__ != "PanicException":
            raise
        raise error(f"cannot load {what}: {one_line(e)}") from e


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    # Torch adds where in its own sources an error was raised.
    words = " ".join(str(error).split()).partition(" Exception raised from ")[0]
    if not words or not isinstance(error, _SPEAKING):
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal for a while."""
    from transformers.utils import logging

    hf_logging: Any = logging
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
