"""What the file of `--trainer` may set: how the training computes, not where it writes or sends."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.options.healing import HealConfig
from isingcut.options.yaml_file import load_yaml

__all__ = ["is_sharded", "read_trainer_file", "trainer_settings"]

_Share = Field(None, ge=0, lt=1)
_Size = Field(None, ge=0)


class _Settings(BaseModel):
    """Fields of transformers' TrainingArguments, by their names there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    optim: str | None = None
    optim_args: str | None = None
    optim_target_modules: str | list[str] | None = None
    weight_decay: float | None = _Size
    adam_beta1: float | None = _Share
    adam_beta2: float | None = _Share
    adam_epsilon: float | None = Field(None, gt=0)
    max_grad_norm: float | None = _Size
    lr_scheduler_kwargs: dict[str, Any] | None = None
    neftune_noise_alpha: float | None = _Size

    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | None = None
    torch_compile: bool | None = None
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    torch_empty_cache_steps: int | None = Field(None, ge=1)
    use_liger_kernel: bool | None = None
    liger_kernel_config: dict[str, bool] | None = None
    full_determinism: bool | None = None

    dataloader_num_workers: int | None = Field(None, ge=0, le=256)
    dataloader_pin_memory: bool | None = None
    dataloader_persistent_workers: bool | None = None
    dataloader_prefetch_factor: int | None = Field(None, ge=1, le=1024)

    fsdp: bool | str | list[str] | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    accelerator_config: dict[str, Any] | str | None = None
    ddp_backend: str | None = None
    ddp_timeout: int | None = Field(None, ge=1)
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = Field(None, ge=1)
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None


def read_trainer_file(path: Path) -> dict[str, Any]:
    """Further `TrainingArguments` from a YAML file.

    Raises:
        InputError: not readable, a name that may not be set there, or a value of a wrong type.
    """
    values = load_yaml(path)
    try:
        _Settings.model_validate(values)
    except ValidationError as e:
        raise InputError(f"{path}: {_said(e)}") from e
    return values


def trainer_settings(config: HealConfig) -> dict[str, Any]:
    """What the file of `--trainer` sets; nothing where there is none.

    Raises:
        InputError: as `read_trainer_file`.
    """
    return read_trainer_file(user_path(config.trainer)) if config.trainer else {}


def is_sharded(config: HealConfig) -> bool:
    """Whether FSDP or DeepSpeed shards the training, and so places its parts on the devices."""
    settings = trainer_settings(config)
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "") for name in ("FSDP", "DEEPSPEED"))
    return bool(settings.get("fsdp") or settings.get("deepspeed")) or "true" in map(
        str.lower, launched
    )


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "a key"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, list(_Settings.model_fields), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return (
            f"--trainer cannot set {name[:60]!r}; {hint}options of `isingcut heal` are given as "
            "such, and what writes or sends elsewhere is fixed; it may set: "
            f"{', '.join(_Settings.model_fields)}"
        )
    return f"{name[:60]}: {first['msg'].lower()}, got {str(first['input'])[:60]!r}"
