"""A `.gguf` file, once converted, is an ordinary bfloat16 Hugging Face folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, ModelError
from isingcut.files.inputs import regular_file, user_path
from isingcut.files.writing import atomic_folder, foreign_in, locked
from isingcut.models.checkpoint.gguf_header import read_gguf
from isingcut.models.fit import bounded_structure, most_numbers
from isingcut.models.loading import loading, quiet_transformers, refuse_incomplete, refuse_infinite
from isingcut.models.transformers_private import unpacked


def gguf_cache() -> Path:
    """Where converted files are kept, by their hash: in `$ISINGCUT_CACHE`, else the platform's.

    Folders of the name ``gguf`` are of versions that completed a file with random numbers.
    """
    home = Path.home()
    if override := os.environ.get("ISINGCUT_CACHE"):
        return user_path(override) / "gguf-2"
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif (home / "Library" / "Caches").is_dir():
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "isingcut" / "gguf-2"


def converted(path: Path) -> Path:
    """The folder of the converted file, made on first use; it is named after the content's hash.

    Every weight is unpacked to bfloat16: a cut of a quantised file is a plain checkpoint.

    Raises:
        ModelError: not a GGUF file, one that lacks a tensor of its architecture, or of an
            architecture transformers cannot convert; or the folder was changed since.
        CheckpointError: a damaged or truncated file.
    """
    regular_file(path, "the GGUF file", ModelError)
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    target = gguf_cache() / digest
    if target.is_dir():
        return _unchanged(target, path)
    held = _numbers(path)
    try:
        # One at a time: what a killed one left has the size of a model, and is cleared.
        with locked(target.parent, inside=True, wait=True):
            if target.is_dir():
                # Another process has made it meanwhile.
                return _unchanged(target, path)
            # Overwriting, because a file system may have no locks.
            with atomic_folder(target, overwrite=True) as temporary:
                _convert(path, temporary, held)
    except InputError as e:
        raise ModelError(
            f"the converted model cannot be kept in {target.parent}: {_words(e)}; set "
            "ISINGCUT_CACHE to a folder with space that you may write to"
        ) from e
    return target


def _unchanged(target: Path, path: Path) -> Path:
    """The folder of the converted file, once it is known to be as it was made."""
    changed = foreign_in(target)
    if changed is not None:
        raise ModelError(
            f"the model converted from {path.name} is not as it was made: {changed}; delete "
            f"{target} and run again"
        )
    return target


def _words(error: InputError) -> str:
    cause = error.__cause__
    return str(getattr(cause, "strerror", None) or error).lower()


def _numbers(path: Path) -> int:
    """How many numbers the file's tensors hold, once its header and its blocks are whole."""
    header = read_gguf(path)
    header.check_blocks()
    return sum(tensor.n_elements for tensor in header.tensors.values())


def _convert(path: Path, folder: Path, held: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with (
        loading(f"{path.name} with transformers"),
        # One of its progress bars has no switch.
        contextlib.redirect_stderr(io.StringIO()),
        bounded_structure(most_numbers(held), path.name),
    ):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, found = loader.from_pretrained(
            **source,
            **unpacked(),
            dtype=torch.bfloat16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_incomplete(found, path)
    refuse_infinite(model.named_parameters(), path)
    # With a quantiser attached, `save_pretrained` refuses.
    for trace in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, trace):
            delattr(model, trace)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
