"""A Llama of a given shape with random weights, written straight to safetensors shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

_SHARD = 4 * 10**9
_POOL = 2**25


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a Llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def block(self) -> int:
        """Parameters of one block, norms left out."""
        narrow = self.hidden // self.heads * self.key_value_heads
        return self.hidden * (2 * self.hidden + 2 * narrow + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """Parameters of the output head; the embedding has as many."""
        return self.hidden * self.vocabulary

    @property
    def bytes(self) -> int:
        """All weights in bfloat16."""
        return 2 * (self.layers * self.block + 2 * self.head)


SEVEN = Shape("7B-shaped Llama", 4096, 11008, 32, 32, 32, 32000)


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write a checkpoint of normal random numbers (norms 1) in bfloat16, with an index.

    Weights are stretches of one pool of numbers at random places: as random to a computation,
    and written at the speed of the disk.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(_POOL, generator=generator) * 0.02).bfloat16()
    pool = torch.cat([pool, pool])
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, sizes in _tensors(shape).items():
        size = 2 * torch.Size(sizes).numel()
        if shards[-1] and filled + size > _SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = sizes
        filled += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        _write_shard(folder / file, shard, pool, generator)
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    wide, narrow = shape.hidden, shape.hidden // shape.heads * shape.key_value_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, wide)}
    for i in range(shape.layers):
        block = f"model.layers.{i}."
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            found[f"{block}self_attn.{name}_proj.weight"] = (rows, wide)
        found[f"{block}self_attn.o_proj.weight"] = (wide, wide)
        for name in ("gate", "up"):
            found[f"{block}mlp.{name}_proj.weight"] = (shape.intermediate, wide)
        found[f"{block}mlp.down_proj.weight"] = (wide, shape.intermediate)
        found[f"{block}input_layernorm.weight"] = (wide,)
        found[f"{block}post_attention_layernorm.weight"] = (wide,)
    found["model.norm.weight"] = (wide,)
    found["lm_head.weight"] = (shape.vocabulary, wide)
    return found


def _write_shard(
    file: Path, shard: dict[str, tuple[int, ...]], pool: torch.Tensor, generator: torch.Generator
) -> None:
    header, offset = {}, 0
    for name, sizes in shard.items():
        end = offset + 2 * torch.Size(sizes).numel()
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    ones = torch.ones(pool.numel(), dtype=torch.bfloat16)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in shard.items():
            left = torch.Size(sizes).numel()
            while left:
                count = min(left, _POOL)
                start = int(torch.randint(_POOL, (1,), generator=generator))
                source = ones if "norm" in name else pool[start:]
                f.write(source[:count].view(torch.uint8).numpy())
                left -= count
