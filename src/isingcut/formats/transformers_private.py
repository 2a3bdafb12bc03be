"""Uses of private parts of transformers.

Changes of these parts in the versions that are known to work, 5.10 to 5.24:

    5.10   renames tensors below a nested model's `base_model_prefix`, an argument that 5.9 lacks
    5.14   new conversion `Interleave`, which does more than stack and concatenate
    5.15   `rename_source_key` can also rename backwards
    5.16   `Concatenate` may store into how many tensors to split its target; it joins as before
    5.17   `GgufConfig`: weights of a GGUF file stay packed unless it sets `dequantize`
    5.23   `TrainingArguments.activation_checkpointing` replaces `gradient_checkpointing`
"""

from __future__ import annotations

import dataclasses
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from isingcut.errors import ModelError

if TYPE_CHECKING:
    import torch

OLDEST = (5, 10)
NEWEST = (5, 24)
KERNEL_LOGGER = "transformers.integrations.hub_kernels"
"""The logger that says which kernels a model lacks."""


def model_classes(factory: Any) -> Any:
    """Return the model classes of an auto class, by configuration class."""
    return factory._model_mapping


def attention_of(model: Any) -> str | None:
    """Return the name of a model's attention implementation; None if it has none."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if isinstance(name, str) else None


def has_adapters(model: Any) -> bool:
    """Whether adapters of PEFT were loaded into a model."""
    return bool(model._hf_peft_config_loaded)


def get_unpacking() -> dict[str, Any]:
    """Return the options of `from_pretrained` that dequantise the weights of a GGUF file."""
    import transformers

    packing: Any = getattr(transformers, "GgufConfig", None)
    return {} if packing is None else {"quantization_config": packing(dequantize=True)}


def get_checkpointing() -> dict[str, bool]:
    """Return the options of `TrainingArguments` for activation checkpointing (activations are
    computed again in the backward pass)."""
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if name in known): True}


class Names:
    """Names and conversions of stored tensors in a model.

    Args:
        model: the model; its weights are not needed.
        dtype: dtype of the model.

    Attributes:
        order: sort key for stored names.
        converters: the converter of each pattern.
        tensors: tensors of the model, by name.
        ties: names of tied tensors: ``{name: name of the tensor that it is tied to}``.

    Raises:
        ModelError: this version of transformers has another loader.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        try:
            from transformers import conversion_mapping, core_model_loading

            loader: Any = core_model_loading
            self._rename = loader.rename_source_key
            self.order = loader.dot_natural_key
            renaming = loader.WeightRenaming
            converter = loader.WeightConverter
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
        self._widened = [
            re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)
        ]

    def target(self, stored: str) -> tuple[str, str | None]:
        """Return a stored tensor's name in the model, and the pattern of its converter, if any."""
        name, pattern = self._rename(
            stored, self._renamings, self._converters, self._prefix, self.tensors
        )
        if name not in self.tensors and stored in self.tensors:
            name, pattern = self._rename(stored, [], [], self._prefix, self.tensors)
        return str(name), pattern

    def dtype_of(self, target: str) -> torch.dtype:
        """Return the dtype of a tensor in the model."""
        import torch

        if any(pattern.search(target) for pattern in self._widened):
            return torch.float32
        return self.tensors[target].dtype

    def is_known(self, target: str) -> bool:
        """Whether the model has this tensor, or transformers also ignores that it has none."""
        patterns = list(self.model._keys_to_ignore_on_load_unexpected or ())
        # Older versions of many families stored these buffers.
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
        return target in self.tensors or any(re.search(p, target) for p in patterns)

    def may_miss(self, target: str) -> bool:
        """Whether a checkpoint may lack a tensor, because the model computes this buffer itself."""
        import torch

        patterns = self.model._keys_to_ignore_on_load_missing or ()
        is_buffer = not isinstance(self.tensors[target], torch.nn.Parameter)
        return is_buffer and any(re.search(p, target) for p in patterns)
