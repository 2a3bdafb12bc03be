"""A model without its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from isingcut.errors import ModelError
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

    hook: Any = on_meta
    with register_module_parameter_registration_hook(hook):
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
