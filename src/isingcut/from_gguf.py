"""A `.gguf` file, once converted, is an ordinary bfloat16 Hugging Face folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
from pathlib import Path

from isingcut.errors import InputError, MissingExtraError, ModelError
from isingcut.files import atomic_folder
from isingcut.model_sources import cache_folder, first_line
from isingcut.models import quiet_transformers


def converted(path: Path) -> Path:
    """The folder of the converted file, made on first use; it is named after the content's hash.

    Every weight is unpacked to bfloat16: a cut of a quantised file is a plain checkpoint.

    Raises:
        MissingExtraError: `gguf` (or `accelerate`, which transformers wants here) is missing.
        ModelError: not a GGUF file, or of an architecture transformers cannot convert.
    """
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    target = cache_folder() / "gguf" / digest
    if target.is_dir():
        return target
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "demo", f"reading {path.name}")
    try:
        # Overwriting: another process may have finished the same conversion meanwhile.
        with atomic_folder(target, overwrite=True) as temporary:
            _convert(path, temporary)
    except InputError as e:
        raise ModelError(
            f"the converted model cannot be kept in {target.parent}: {_words(e)}; set "
            "ISINGCUT_CACHE to a folder with space that you may write to"
        ) from e
    return target


def _words(error: InputError) -> str:
    cause = error.__cause__
    return str(getattr(cause, "strerror", None) or error).lower()


def _convert(path: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Newer transformers can keep GGUF weights packed, and then refuse to save them.
    packing = getattr(transformers, "GgufConfig", None)
    unpack = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        # One of its progress bars has no switch, hence stderr as well.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, **unpack, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as e:
        raise ModelError(f"transformers cannot convert {path.name}: {first_line(e)}") from e
    # With a quantiser attached, `save_pretrained` refuses.
    for trace in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, trace):
            delattr(model, trace)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
