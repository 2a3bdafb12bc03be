"""Options of the model, and of the devices that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isingcut.options import parsed
from isingcut.options.declaration import Options, option

BATCH_TOKENS = 1024
"""Tokens per micro-batch on a CPU, unless an option sets another number."""


@dataclass(frozen=True, init=False)
class ModelOptions(Options):
    """How any model is loaded."""

    dtype: parsed.Dtype = option(
        "auto", "Dtype of the weights: auto, float32, bfloat16 or float16."
    )
    device: parsed.Device = option(
        "auto",
        "Device: auto, cpu, cuda, cuda:N; several (cuda:0,cuda:1) have a part of the model each.",
    )
    trust_remote_code: bool = option(
        False, "Allow the model's own Python code to run.", typed=True
    )


@dataclass(frozen=True, init=False)
class MachineOptions(ModelOptions):
    """The original model of a run, and how it is computed."""

    model: str = option(
        "",
        "Local Hugging Face folder, hub id, .gguf file, or 'smollm2'.",
        argument=True,
    )
    units: Literal["blocks", "sublayers"] = option(
        "blocks",
        "What to remove. blocks: whole layers (in a hybrid, its blocks). sublayers: the attention "
        "or the MLP of a layer alone; --remove attention=6 saves as much of the cache as 6 blocks "
        "for about half of the loss.",
        stages="calibration",
    )
    cards_per_process: parsed.Count | None = option(
        None,
        "GPUs for each process of torchrun (default: one); without it, as many as hold the model.",
    )
    attention: Literal["auto", "sdpa", "eager"] = option(
        "auto",
        "How measurements compute attention: sdpa, eager, or auto (as transformers chooses).",
    )
    batch_tokens: parsed.Tokens | None = option(
        None,
        "Tokens per micro-batch (default: 1,024 on a CPU, as many as fit on a GPU).",
    )
    stream: Literal["auto", "on", "off"] = option(
        "auto",
        "Read the blocks from disk one at a time: on, off, or auto (on if the weights exceed "
        "--memory-limit).",
    )
    memory_limit: parsed.Memory = option(
        parsed.Memory(),
        "Memory for weights and hidden states: 8GB or 50% (default: 80% of the free memory).",
    )
