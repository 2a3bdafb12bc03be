"""What `isingcut inspect` shows: blocks, costs and legal states, without loading weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from isingcut.errors import ArchitectureError, ModelError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures.auto import auto_class
from isingcut.models.architectures.base import Block, BlockStack
from isingcut.models.architectures.discover import find_stack, text_config
from isingcut.models.architectures.same_blocks import check_same_blocks
from isingcut.models.architectures.surgery import legality
from isingcut.models.checkpoint.read import StoredTensor
from isingcut.models.fit import bounded_structure, by_block, check_sizes, examine
from isingcut.models.loading import loading


@dataclass(frozen=True)
class Inspection:
    """A model's blocks and which states are legal.

    Args:
        model_type: the decoder's, for example ``"qwen3_moe"``.
        stack: its blocks; ``bytes`` are those stored where the checkpoint is there.
        rows: what every state has to obey.
        refusal: why no state can be cut; empty where cutting works.
        quantisation: the quantisation method; empty for plain weights.
        other_bytes: stored bytes outside the blocks; 0 without weights.
        parameters: of the whole model, embeddings included.
        positions: the longest sequence, where the model has a limit.
    """

    model_type: str
    stack: BlockStack
    rows: tuple[LinearConstraint, ...]
    refusal: str
    quantisation: str
    other_bytes: int
    parameters: int
    positions: int | None

    def rules(self) -> list[str]:
        """The legality rows in words, rows of one reason together."""
        names: dict[str, list[str]] = {}
        for row in self.rows:
            names.setdefault(row.reason, []).append(row.name)
        return [f"{', '.join(rows)}: {reason}" for reason, rows in names.items()]

    def table(self) -> list[tuple[str, ...]]:
        """Header, one row per run of like neighbours, and the sum, as text.

        Columns: numbers of the blocks, kind, then for *each* block of the run parameters, active
        parameters, stored bytes, bytes of KV cache per token and of recurrent state.
        """
        header: tuple[str, ...] = (
            "blocks",
            "kind",
            "parameters",
            "active",
            "bytes",
            "KV bytes/token",
            "state bytes",
        )
        runs: list[list[Block]] = []
        for block in self.stack.blocks:
            if runs and runs[-1][0].kind == block.kind and _costs(runs[-1][0]) == _costs(block):
                runs[-1].append(block)
            else:
                runs.append([block])
        rows = [header]
        for run in runs:
            first, last = run[0].index, run[-1].index
            numbers = f"{first}" if first == last else f"{first}-{last}"
            rows.append((numbers, run[0].kind, *(f"{n:,}" for n in _costs(run[0]))))
        total = [sum(column) for column in zip(*map(_costs, self.stack.blocks), strict=True)]
        rows.append(("all", "", *(f"{n:,}" for n in total)))
        return rows


def _costs(block: Block) -> tuple[int, ...]:
    return (
        block.parameters,
        block.active_parameters,
        block.bytes,
        block.kv_bytes_per_token,
        block.state_bytes,
    )


def inspect_model(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Find a checkpoint's blocks on the meta device and say which states are legal.

    Args:
        folder: a Hugging Face folder; only its ``config.json`` is needed, and tensor headers
            are used for the stored bytes where there are weights.
        trust_remote_code: allow the model's own code to run.

    Raises:
        ModelError: transformers cannot build the model, or it has tensors of another number of
            blocks than its configuration says.
        CheckpointError: the configuration or a header is damaged.
        ArchitectureError: it has no block stack.
    """
    from transformers import AutoConfig

    folder, configs = Path(folder), cast(Any, AutoConfig)
    seen = examine(folder, weights=False)
    if seen.mismatch:
        raise ModelError(seen.mismatch)
    with loading(f"the model in {folder}"):
        config = configs.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Kernels of the quantisation need a GPU; the structure does not.
        config.__dict__.pop("quantization_config", None)
        with bounded_structure(seen.most_numbers, str(folder)), torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    check_sizes(seen, model)
    stack = find_stack(model)
    refusal, rows = "", []
    try:
        rows = legality(seen.config, stack)
        check_same_blocks(seen.config, stack, rows)
    except ArchitectureError as error:
        refusal = str(error)
    stack, other = _stored_bytes(seen.stored, stack)
    quantisation = seen.config.get("quantization_config") or {}
    return Inspection(
        model_type=str(text_config(model).model_type),
        stack=stack,
        rows=tuple(rows),
        refusal=refusal,
        quantisation=str(quantisation.get("quant_method") or quantisation.get("quant_algo") or ""),
        other_bytes=other,
        parameters=sum(p.numel() for p in model.parameters()),
        positions=getattr(text_config(model), "max_position_embeddings", None),
    )


def _stored_bytes(stored: Mapping[str, StoredTensor], stack: BlockStack) -> tuple[BlockStack, int]:
    """The stack with the bytes that the checkpoint really stores, and those outside it."""
    if not stored:
        return stack, 0
    found = by_block(stored, len(stack), heads=len(stack))
    sizes = [sum(tensor.size for tensor in block.values()) for block in found]
    blocks = tuple(
        dataclasses.replace(block, bytes=size)
        for block, size in zip(stack.blocks, sizes, strict=True)
    )
    return BlockStack(stack.path, blocks), sum(t.size for t in stored.values()) - sum(sizes)
