"""Write a sharded 7B-shaped Llama with random weights and any number of blocks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

_POOL = 2**28
"""Size of the pool of random numbers; more than a tensor has."""


def write_model(folder: Path, blocks: int = 32, vocabulary: int = 32000) -> int:
    """Write a checkpoint of normal random numbers (norms 1) in bfloat16 and return its bytes.

    Weights are slices of one pool of numbers at random offsets: random enough for a computation,
    and limited by the speed of the disk only.
    """
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=blocks, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).bfloat16().state_dict()
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(_POOL, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def filled(name: str) -> torch.Tensor:
        like = shapes[name]
        if "norm" in name:
            return torch.ones(like.shape, dtype=like.dtype)
        start = int(torch.randint(_POOL - like.numel() + 1, (1,), generator=generator))
        return pool[start : start + like.numel()].view(like.shape).clone()

    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size="1GB"
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: filled(name) for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return int(split.metadata["total_size"])
