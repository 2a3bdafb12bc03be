"""Compute the size of a model in GGUF types, and pack and dequantise its weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isingcut.files.runs import BlockCosts, PackedModel
from isingcut.formats.architectures.blocks import (
    language_model,
    tensor_prefixes,
    text_config,
)
from isingcut.formats.cutting.gguf import names_in_gguf, omits_attention
from isingcut.formats.gguf_files import (
    PLAIN_TYPES,
    GgufHeader,
    block_of,
    packed_type,
    read_gguf,
)
from isingcut.formats.safetensors_files import read_checkpoint
from isingcut.models.load import LoadedModel


class Packer:
    """Tensors of a model, to be packed in GGUF types.

    Args:
        loaded: the model; its weights may be on disk.
        file: the GGUF file that it was converted from. None: a checkpoint; matrices then count as
            bfloat16, and the size of the metadata is estimated from the vocabulary.

    Attributes:
        header: header of that file, if any.
    """

    def __init__(self, loaded: LoadedModel, file: Path | None) -> None:
        import gguf

        self._kinds = gguf.GGMLQuantizationType
        self._sizes = gguf.GGML_QUANT_SIZES
        model = loaded.model
        self.header: GgufHeader | None = None if file is None else read_gguf(file)
        self._align = 32
        self._places = tensor_prefixes(model)
        self._types: dict[str, Any] = {}
        # Shape (row length last), current type and block (-1 outside all) of each tensor.
        self._tensors: dict[str, tuple[list[int], Any, int]] = {}
        stack = loaded.stack
        # Sublayers that go alone stay as zeros in the file, unless llama.cpp can run without them.
        self._stay = {
            i for i, k in enumerate(stack.layers) if stack.layers.count(k) > 1
        }
        written = (
            self.header.architecture if self.header else text_config(model).model_type
        )
        if omits_attention(written):
            self._stay -= {stack.layers.index(k) for k in stack.layers if k}
        # The embedding, if it is not also the head: a token reads only one row of it.
        self._looked_up = ""
        if self.header is None:
            embedding = language_model(model).get_input_embeddings().weight
            for name, p in model.named_parameters():
                kind = self._kinds.BF16 if p.ndim > 1 else self._kinds.F32
                self._tensors[name] = [*p.shape], kind, self._block(name)
                if p is embedding and not text_config(model).tie_word_embeddings:
                    self._looked_up = name
            self._rest = sum(
                21 + 2 * len(word.encode()) for word in loaded.tokenizer.get_vocab()
            )
            return
        assert file is not None
        header = self.header
        count = header.check_blocks()
        known = header.tensors
        named = names_in_gguf(header, count, read_checkpoint(loaded.folder))
        for name, stored in named.items():
            if name in known:
                self._types[stored.name] = known[name].tensor_type
        self._align = int(header.value("general.alignment") or 32)
        for name, t in known.items():
            place = (block_of(name) or (count, ""))[0]
            block = place if place < count else -1
            if stack.split:
                block = self._block(named[name].name) if name in named else -1
            self._tensors[name] = t.shape[::-1].tolist(), t.tensor_type, block
        self._looked_up = "token_embd.weight" if "output.weight" in known else ""
        sizes = (self._bytes(shape, kind) for shape, kind, _ in self._tensors.values())
        self._rest = file.stat().st_size - sum(sizes)

    def _block(self, name: str) -> int:
        return next((i for i, at in enumerate(self._places) if name.startswith(at)), -1)

    def _bytes(self, shape: Sequence[int], kind: Any) -> int:
        numbers, size = self._sizes[kind]
        return -(-math.prod(shape) // numbers * size // self._align) * self._align

    def costs(self, wanted: str, blocks: Sequence[BlockCosts]) -> PackedModel:
        """Return the size of the whole model with blocks packed as ``wanted`` ("": unchanged).

        The size is exact except for a cut file's header, which counts as long as the whole model's.

        Raises:
            ArchitectureError: a patched layer could not be packed.
        """
        size, read, before = np.zeros((3, len(blocks) + 1))
        active = [b.active_parameters / max(1, b.parameters) for b in blocks] + [1.0]
        for name, (shape, own, block) in self._tensors.items():
            packed_type(name, shape, own, wanted, inside=block >= 0, new=block >= 0)
            kind = packed_type(name, shape, own, wanted, inside=block >= 0)
            place = -1 if block in self._stay else block
            size[place] += self._bytes(shape, kind)
            if name != self._looked_up:
                read[place] += self._bytes(shape, kind) * active[block]
                before[block] += self._bytes(shape, own) * active[block]
        *each, other = map(int, size)
        *each_read, other_read = map(int, read)
        return PackedModel(
            type=wanted,
            bytes=each,
            read=each_read,
            other=other + self._rest,
            read_other=other_read,
            read_before=int(before.sum()),
        )

    def pack(
        self, wanted: str, name: str, own: Tensor, new: Tensor | None = None
    ) -> Tensor | None:
        """Return the value of a parameter after packing and dequantising; None if unchanged.

        Transposed layers, those of GPT-2, are packed along their other axis.

        Args:
            name: name of the parameter.
            own: its current value.
            new: value of a patch to pack instead.
        """
        from gguf.quants import dequantize, quantize

        value = own if new is None else new
        kind = self._types.get(name, self._kinds.BF16)
        given = {"inside": self._block(name) >= 0, "new": new is not None}
        target = packed_type(name, value.shape, kind, wanted, **given)
        if target.name in PLAIN_TYPES or (target == kind and new is None):
            return None if new is None else new.to(own)
        rows = value.detach().float().cpu().contiguous().numpy()
        return torch.from_numpy(dequantize(quantize(rows, target), target)).to(own)
