"""What a Python caller hands over where a path is typed: a loaded model, a list of texts.

Each gets a name that stands in the options and in `run.json` where a path would, and that holds
a hash of what it names, so that another list is another source. The thing itself is found under
that name as long as it is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.errors import CalibrationError, InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r".* in memory \([0-9a-f]{16}\)")
_held: dict[str, list[Any]] = {}


def is_name(word: str) -> bool:
    """Whether a word is the name of something handed over, held or not."""
    return _NAME.fullmatch(word) is not None


def find(name: str) -> Any:
    """What is held under a name: a folder or a list of texts; None for any other word.

    Raises:
        InputError: a name of that form, of something that is held no more.
    """
    if not is_name(name):
        return None
    if not _held.get(name):
        raise InputError(
            f"{name!r} was handed over in Python and is not kept; hand it over there again, or "
            "write it to disk and give its path"
        )
    return _held[name][-1]


@contextlib.contextmanager
def texts(given: Sequence[str]) -> Iterator[str]:
    """Hold a list of texts; gives its name.

    Raises:
        CalibrationError: no list of strings, or an empty one.
    """
    if not isinstance(given, list | tuple):
        raise CalibrationError(
            f"calibration must be a source's name or a list of texts, got {type(given).__name__}"
        )
    if not given:
        raise CalibrationError("calibration is an empty list; give texts")
    digest = hashlib.sha256()
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration must be a list of strings, but text {number} is of type "
                f"{type(text).__name__}"
            )
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    with _holding(f"{len(given)} texts in memory ({digest.hexdigest()[:16]})", list(given)) as name:
        yield name


@contextlib.contextmanager
def model(given: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Save a loaded model into a temporary folder and hold that; gives its name.

    Raises:
        InputError: no transformers model, no tokenizer, or a model that cannot be saved whole.
        ModelError: saving it failed.
    """
    from isingcut.errors import first_line
    from isingcut.models import model_identity, quiet_transformers

    _check_model(given)
    _check_tokenizer(tokenizer)
    assert tokenizer is not None
    with tempfile.TemporaryDirectory(prefix="isingcut-", ignore_cleanup_errors=True) as place:
        folder = Path(place) / "model"
        try:
            with quiet_transformers():
                given.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as e:
            raise ModelError(
                f"saving the loaded model into {folder} failed ({first_line(e)}); save it with "
                "save_pretrained yourself and give that folder"
            ) from e
        digest = model_identity(folder)["sha256"][:16]
        with _holding(f"{type(given).__name__} in memory ({digest})", folder) as name:
            yield name


@contextlib.contextmanager
def _holding(name: str, thing: Any) -> Iterator[str]:
    # A list, because two runs may hold the same thing at a time.
    _held.setdefault(name, []).append(thing)
    try:
        yield name
    finally:
        _held[name].pop()


def _check_model(given: Any) -> None:
    from transformers import PreTrainedModel

    advice = "save_pretrained it into a folder and give that"
    if not isinstance(given, PreTrainedModel):
        raise InputError(
            "model must be a folder, a hub id, a .gguf file or a loaded transformers model, got "
            f"{type(given).__name__} (merge the adapters of a PEFT model first: "
            "merge_and_unload)"
        )
    if getattr(given, "_hf_peft_config_loaded", False):
        raise InputError(
            f"this {type(given).__name__} has adapters loaded, which are no part of its blocks; "
            "merge them with PEFT (merge_and_unload) and give the merged model"
        )
    quantised = getattr(given.config, "quantization_config", None) is not None
    if quantised or getattr(given, "hf_quantizer", None) is not None:
        raise InputError(
            f"this {type(given).__name__} is quantised in memory, so its blocks cannot be saved "
            "as they were; give the folder or hub id of the model before quantisation"
        )
    if any(p.device.type == "meta" for p in given.parameters()):
        raise InputError(
            f"this {type(given).__name__} has weights that are not in memory (offloaded); "
            f"give the folder it was loaded from, or {advice}"
        )


def _check_tokenizer(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerBase

    if tokenizer is None:
        raise InputError("a loaded model needs its tokenizer: prune(model, tokenizer=...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}"
        )
