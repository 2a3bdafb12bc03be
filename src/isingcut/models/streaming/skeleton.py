"""A model without its weights, and the names that its checkpoint knows them by.

The names and conversions (a list of experts that becomes one tensor, say) are transformers'
own, so that a streamed block has the numbers that `from_pretrained` gives it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from isingcut.errors import ModelError, first_line
from isingcut.models.architectures.auto import auto_class
from isingcut.models.fit import bounded_structure, check_fit
from isingcut.models.fp8 import fp8_layout
from isingcut.models.loading import loading


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules built meanwhile keep their parameters on the meta device, and real buffers.

    Rotary frequencies and masks are buffers that no checkpoint holds: they have to be computed.
    """

    def on_meta(owner: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(moved).update(vars(parameter))
        return moved

    with register_module_parameter_registration_hook(on_meta):
        yield


def build_skeleton(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint folder: parameters on the meta device, buffers real.

    Args:
        dtype: of its floating-point parameters, but for those the family keeps in float32.

    Raises:
        ModelError: transformers cannot build it, its configuration and its tensors do not fit
            each other, or its weights are packed in a way that can only be loaded whole.
    """
    from transformers import AutoConfig, GenerationConfig

    configs: Any = AutoConfig
    seen = check_fit(folder)
    _refuse_packed(folder, seen.config)
    with loading(f"the model in {folder}"), bounded_structure(seen.most_numbers, str(folder)):
        config = configs.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.name_or_path = str(folder)
        factory = auto_class(config)
        with torch.device("meta"):
            # First without any memory: what its buffers would take is real below.
            factory.from_config(config, trust_remote_code=trust_remote_code)
    with loading(f"the model in {folder}"):
        with without_weights(), torch.random.fork_rng(devices=[]):
            model = factory.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    model.requires_grad_(False)
    return model


def _refuse_packed(folder: Path, raw: Mapping[str, Any]) -> None:
    packed = raw.get("quantization_config")
    if packed and not fp8_layout(folder, raw):
        method = packed.get("quant_method") or packed.get("quant_algo") or "unknown"
        raise ModelError(
            f"the weights in {folder} are packed by {method!r}, which can only be loaded whole; "
            "pass --stream off, or give a checkpoint in bfloat16, float32 or FP8"
        )


class Names:
    """What each stored tensor is called in the model, and how it gets there.

    Args:
        model: the skeleton.
        dtype: the model's.

    Raises:
        ModelError: this version of transformers has another loader.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )
        except ImportError as e:
            raise ModelError(
                "streaming reads weights with the loader of transformers 5.10 to 5.24, which the "
                f"installed version does not have ({first_line(e)}); install one of these, or "
                "pass --stream off"
            ) from e
        self._rename: Any = rename_source_key
        self.order: Any = dot_natural_key
        mapping = get_model_conversion_mapping(model, None, None)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._converter_of = {p: c for c in self._converters for p in c.source_patterns}
        self._prefix = model.base_model_prefix
        self.model = model
        self.tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._widened = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)]

    def target(self, stored: str) -> tuple[str, str | None]:
        """The model's name of a stored tensor, and the pattern of the converter it belongs to."""
        name, pattern = self._rename(
            stored, self._renamings, self._converters, self._prefix, self.tensors
        )
        if name not in self.tensors and stored in self.tensors:
            name, pattern = self._rename(stored, [], [], self._prefix, self.tensors)
        return str(name), pattern

    def converter(self, pattern: str) -> Any:
        """The conversion that a pattern belongs to."""
        return self._converter_of[pattern]

    def dtype_of(self, target: str) -> torch.dtype:
        """The dtype that the model has a tensor in."""
        if any(pattern.search(target) for pattern in self._widened):
            return torch.float32
        return self.tensors[target].dtype

    def ties(self) -> dict[str, str]:
        """Names of tensors that are another one: ``{this: that}``."""
        return dict(self.model.all_tied_weights_keys)

    def may_be_extra(self, target: str) -> bool:
        """Whether a stored tensor without a place in the model is one transformers drops too."""
        patterns = list(self.model._keys_to_ignore_on_load_unexpected or ())
        # Older versions of many families stored these buffers.
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
        return any(re.search(p, target) for p in patterns)

    def may_miss(self, target: str) -> bool:
        """Whether a checkpoint need not hold a tensor: the model computes that buffer itself."""
        patterns = self.model._keys_to_ignore_on_load_missing or ()
        is_buffer = not isinstance(self.tensors[target], torch.nn.Parameter)
        return is_buffer and any(re.search(p, target) for p in patterns)
