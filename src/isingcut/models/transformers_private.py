"""All that is used of transformers and is not public.

What changed there in the versions that are known to work, 5.10 to 5.24:

    5.10   renames tensors below a nested model's `base_model_prefix`, an argument that 5.9 lacks
    5.14   has the conversion `Interleave`, which is more than stacking and joining
    5.15   `rename_source_key` can go backwards
    5.16   `Concatenate` may know how many tensors to make of its target again; it joins as before
    5.17   `GgufConfig`: weights of a GGUF file stay packed unless it says otherwise
    5.23   `TrainingArguments.activation_checkpointing` is what `gradient_checkpointing` was
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from isingcut.errors import ModelError
from isingcut.memory import raise_if_exhausted

if TYPE_CHECKING:
    import torch

OLDEST, NEWEST = (5, 10), (5, 24)


def model_classes(factory: Any) -> Any:
    """Return the model classes of an auto class, by those of their configurations."""
    return factory._model_mapping


def attention_of(model: Any) -> str | None:
    """Return the name of the attention that a model computes with; None if it has none."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return found if isinstance(found, str) else None


def has_adapters(model: Any) -> bool:
    """Whether adapters of PEFT were loaded into a model."""
    return bool(model._hf_peft_config_loaded)


def get_unpacking() -> dict[str, Any]:
    """Return the options of `from_pretrained` that unpack the weights of a GGUF file."""
    import transformers

    packing: Any = getattr(transformers, "GgufConfig", None)
    return {} if packing is None else {"quantization_config": packing(dequantize=True)}


def get_checkpointing() -> dict[str, bool]:
    """Return the options of `TrainingArguments` that compute activations again in the backward
    pass."""
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if name in known): True}


def load_mtp(model: Any, decoder: Any, numbers: Iterable[int]) -> Any | None:
    """Load a model's layers for multi-token prediction (MTP), as `generate(use_mtp=True)` does.

    Args:
        model: as loaded from its folder; it learns ``numbers`` for `generate`.
        decoder: its causal language model.
        numbers: of MTP layers that are numbered on after the blocks; its class knows those of
            released models only.

    Returns:
        None if transformers has no code for them.
    """
    for known in {model, decoder} if numbers else ():
        known._keys_to_ignore_on_load_unexpected = {rf"layers\.{i}\." for i in numbers}
    try:
        from transformers.modeling_layers import MtpModel

        found: Any = MtpModel.from_pretrained(decoder, device_map={"": model.device})
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        raise_if_exhausted(error)
        return None
    return found.eval()


class Names:
    """What each stored tensor is called in a model, and how it gets there.

    Args:
        model: without its weights is enough.
        dtype: the model's.

    Attributes:
        order: the key by which stored names are sorted.
        converters: the conversion that each pattern belongs to.
        tensors: the model's, by name.
        ties: names of tensors that are another one: ``{this: that}``.

    Raises:
        ModelError: this version of transformers has another loader.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        try:
            from transformers import conversion_mapping, core_model_loading

            loader: Any = core_model_loading
            self._rename, self.order = loader.rename_source_key, loader.dot_natural_key
            renaming, converter = loader.WeightRenaming, loader.WeightConverter
            mapping = conversion_mapping.get_model_conversion_mapping(model, None, None)
        except (ImportError, AttributeError) as e:
            oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
            raise ModelError(
                f"transformers {version('transformers')} has another loader ({e}), so weights "
                f"cannot be read one block at a time; install one of {oldest} to {newest}, or pass "
                "--stream off"
            ) from e
        self._renamings = [m for m in mapping if isinstance(m, renaming)]
        self._converters = [m for m in mapping if isinstance(m, converter)]
        self.converters = {p: c for c in self._converters for p in c.source_patterns}
        self.ties: dict[str, str] = dict(model.all_tied_weights_keys)
        self._prefix = model.base_model_prefix
        self.model = model
        self.tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._widened = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)]

    def target(self, stored: str) -> tuple[str, str | None]:
        """Return the model's name of a stored tensor, and the pattern of its converter."""
        name, pattern = self._rename(
            stored, self._renamings, self._converters, self._prefix, self.tensors
        )
        if name not in self.tensors and stored in self.tensors:
            name, pattern = self._rename(stored, [], [], self._prefix, self.tensors)
        return str(name), pattern

    def dtype_of(self, target: str) -> torch.dtype:
        """Return the dtype that the model has a tensor in."""
        import torch

        if any(pattern.search(target) for pattern in self._widened):
            return torch.float32
        return self.tensors[target].dtype

    def may_be_extra(self, target: str) -> bool:
        """Whether a stored tensor without a place in the model is one transformers drops too."""
        patterns = list(self.model._keys_to_ignore_on_load_unexpected or ())
        # Older versions of many families stored these buffers.
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
        return any(re.search(p, target) for p in patterns)

    def may_miss(self, target: str) -> bool:
        """Whether a checkpoint need not hold a tensor: the model computes that buffer itself."""
        import torch

        patterns = self.model._keys_to_ignore_on_load_missing or ()
        is_buffer = not isinstance(self.tensors[target], torch.nn.Parameter)
        return is_buffer and any(re.search(p, target) for p in patterns)
