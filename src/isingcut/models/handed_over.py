"""A loaded model that a Python caller hands over: saved once, held as that folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from isingcut.data.mixture import hold
from isingcut.errors import InputError, ModelError, first_line
from isingcut.files.writing import temporary_folder
from isingcut.memory import raise_if_exhausted
from isingcut.models.loading import quiet_transformers
from isingcut.models.sources import model_identity
from isingcut.models.transformers_private import has_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def model(given: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Save a loaded model into a temporary folder and hold that; gives its name.

    Raises:
        InputError: no transformers model, no tokenizer, or a model that cannot be saved whole.
        ModelError: saving it failed.
    """
    _check_model(given)
    _check_tokenizer(tokenizer)
    assert tokenizer is not None
    with temporary_folder() as place:
        folder = place / "model"
        try:
            with quiet_transformers():
                given.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except Exception as e:
            raise_if_exhausted(e)
            raise ModelError(
                f"saving the loaded model into {folder} failed ({first_line(e)}); save it with "
                "save_pretrained yourself and give that folder"
            ) from e
        digest = model_identity(folder)["sha256"][:16]
        with hold(f"{type(given).__name__} in memory ({digest})", folder) as name:
            yield name


def _check_model(given: Any) -> None:
    from transformers import PreTrainedModel

    advice = "save_pretrained it into a folder and give that"
    if not isinstance(given, PreTrainedModel):
        raise InputError(
            "model must be a folder, a hub id, a .gguf file or a loaded transformers model, got "
            f"{type(given).__name__} (merge the adapters of a PEFT model first: "
            "merge_and_unload)"
        )
    if has_adapters(given):
        raise InputError(
            f"this {type(given).__name__} has adapters loaded, which are no part of its blocks; "
            "merge them with PEFT (merge_and_unload) and give the merged model"
        )
    quantised = getattr(given.config, "quantization_config", None) is not None
    # Torch's own quantisation puts modules in place of the layers, and says so nowhere else.
    packed = any("quantized" in type(module).__module__ for module in given.modules())
    if quantised or packed or getattr(given, "hf_quantizer", None) is not None:
        raise InputError(
            f"this {type(given).__name__} is quantised in memory, so its blocks cannot be saved "
            "as they were; give the folder or hub id of the model before quantisation"
        )
    if any(p.device.type == "meta" for p in given.parameters()):
        raise InputError(
            f"this {type(given).__name__} has weights that are not in memory (offloaded); "
            f"give the folder it was loaded from, or {advice}"
        )
    for name, module in given.named_modules():
        found = _beside_weights(module)
        if found is not None:
            raise InputError(
                f"{name or 'the model'} ({type(module).__name__}) {found}, or give the model's "
                "folder: only what save_pretrained writes is measured"
            )


def _beside_weights(module: Any) -> str | None:
    """What changes a module's output and is not saved with it, and what to do; None for nothing."""
    if hasattr(module, "_hf_hook"):
        return (
            "has its forward replaced by a hook of accelerate, as device_map sets over several "
            "devices; load it without device_map"
        )
    if "forward" in vars(module):
        return "has its forward replaced; load the model anew"
    # transformers' own record outputs, or act in training alone.
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(not str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks):
        return "has forward hooks; remove them (handle.remove())"
    return None


def _check_tokenizer(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerBase

    if tokenizer is None:
        raise InputError("a loaded model needs its tokenizer: prune(model, tokenizer=...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}"
        )
