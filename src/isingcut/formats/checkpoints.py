"""Check that a checkpoint's tensors and its configuration match, from headers alone.

The check comes before a model is built, because numbers in a configuration allocate memory.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.errors import CheckpointError, ModelError
from isingcut.formats.architectures.cuts import (
    OTHER_STACKS,
    depth,
    explain_uncuttable,
    mtp_layers,
    read_decoder,
    refuse_packing,
)
from isingcut.formats.libraries import explain_shape
from isingcut.formats.safetensors_files import (
    StoredTensor,
    read_checkpoint,
    read_config,
)

if TYPE_CHECKING:
    import torch

# Names of counts for which configuration classes build a list or table of that length.
_COUNTS = re.compile(r"layer|depth|label|block|stage")
_MOST_COUNTED = 100_000
_FORMS = {
    "auto_map": dict,
    "llm_config": dict,
    "language_config": dict,
    "model_type": str,
    "quantization_config": dict,
    "text_config": dict,
}
_NUMBERED = re.compile(r"^(.*?\.)?([A-Za-z_]+)\.([0-9]{1,9})\.")
# A model may have more parameters than its file has elements: tied weights, and missing tensors,
# which a later message names.
_MORE = 4
_SPARE = 2**20
# Factor by which the blocks may be smaller than the largest stack (of an image tokeniser).
_SMALLER = 10
_MOST_IN_BUFFERS = 2**28
_MOST_WITHOUT_WEIGHTS = 2**44


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and tensors.

    Attributes:
        config: content of its ``config.json``.
        stored: its tensors by name; empty without weights.
    """

    folder: Path
    config: dict[str, Any]
    stored: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, folder: Path, *, weights: bool = True) -> Checkpoint:
        """Read a checkpoint's configuration and headers, and check that they match.

        Args:
            weights: whether weights are required, in a supported packing.

        Raises:
            CheckpointError: configuration or headers are damaged, or a block has no tensors.
            ModelError: a number in the configuration is larger than any model's, or configuration
                and tensors have different numbers of blocks; the message has both.
            ArchitectureError: the configuration is not valid, or the weights' packing not
                supported.
        """
        config = read_config(folder)
        for name, kind in _FORMS.items():
            if config.get(name) is not None and not isinstance(config[name], kind):
                raise ModelError(
                    f"{folder / 'config.json'} has {name}={config[name]!r:.60}; expected "
                    f"{'an object' if kind is dict else 'a text'}"
                )
        _refuse_huge(folder, config)
        stored = {}
        if weights or any(folder.glob("*.safetensors")):
            stored = read_checkpoint(folder)
        if weights:
            refuse_packing(config)
        checkpoint = cls(folder, config, stored)
        if not config.get("is_encoder_decoder"):
            checkpoint._check_blocks()
        return checkpoint

    def _check_blocks(self) -> None:
        count = self.depth
        _, numbers = self._stack
        if not numbers:
            return
        there = max(numbers) + 1
        if count <= there <= count + self.mtp_layers:
            there = count
        if gaps := set(range(there)) - numbers:
            raise CheckpointError(
                f"the checkpoint in {self.folder} has tensors of blocks up to {max(numbers)}, but "
                f"none of block {min(gaps)}; complete the download"
            )
        if there != count:
            raise ModelError(
                explain_uncuttable(self.text)
                or f"config.json says {count} blocks, but the checkpoint has tensors of {there}; "
                f"write {there} into {self.folder / 'config.json'}, or get its weights"
            )

    @cached_property
    def text(self) -> dict[str, Any]:
        """The decoder's configuration, with per-layer fields written out."""
        return read_decoder(self.config)

    @property
    def depth(self) -> int:
        """Number of blocks in the configuration."""
        return depth(self.text)

    @property
    def mtp_layers(self) -> int:
        """Number of layers for multi-token prediction in the configuration."""
        return mtp_layers(self.text)

    @cached_property
    def _stack(self) -> tuple[str, set[int]]:
        """The name prefix of the block tensors, and their block numbers.

        Prefixes with the right numbers win, unless their tensors are far too small; then the
        largest.
        """
        numbers = defaultdict[str, set[int]](set)
        sizes = Counter[str]()
        for name, tensor in self.stored.items():
            match = _NUMBERED.match(name)
            if match is not None and not is_mtp(before := match[1] or ""):
                prefix = f"{before}{match[2]}."
                numbers[prefix].add(int(match[3]))
                sizes[prefix] += tensor.size
        # Leave out blocks of other modalities, unless the model is an encoder (BERT as a decoder).
        ours = [p for p in sizes if not any(word in p for word in OTHER_STACKS)]
        ours = ours or list(sizes)
        least = max((sizes[p] for p in ours), default=0) / _SMALLER
        blocks = set(range(self.depth))
        most = set(range(self.depth + self.mtp_layers))
        fits = [p for p in ours if sizes[p] >= least and blocks <= numbers[p] <= most]
        prefix = max(fits or ours, key=lambda p: sizes[p], default="")
        return prefix, numbers[prefix]

    @property
    def prefix(self) -> str:
        """Common prefix of the names of all block tensors, up to the block number.

        Raises:
            CheckpointError: no tensor has such a name.
        """
        prefix, numbers = self._stack
        if not numbers:
            raise CheckpointError("the checkpoint has no tensors of numbered blocks")
        return prefix

    def by_block(self) -> list[dict[str, StoredTensor]]:
        """Return the tensors of each block, with their names inside it; errors as `prefix`."""
        blocks: dict[str, dict[str, StoredTensor]] = {
            f"{self.prefix}{i}": {} for i in range(self.depth)
        }
        for name, tensor in self.stored.items():
            number, _, rest = name.removeprefix(self.prefix).partition(".")
            blocks.get(self.prefix + number, {})[rest] = tensor
        return list(blocks.values())

    def mtp_tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors of the layers for multi-token prediction, by name."""
        return {name: t for name, t in self.stored.items() if is_mtp(name, self.text)}

    @property
    def most_numbers(self) -> int | None:
        """Largest number of weights in its tensors; None without weights."""
        numbers = (tensor.most_numbers for tensor in self.stored.values())
        return sum(numbers) if self.stored else None


def check_sizes(seen: Checkpoint, model: Any) -> None:
    """Check that the parameters of a model have the sizes of the stored tensors of the same name.

    Packed tensors, and those stored under other names, are left to the loader.

    Args:
        model: the model of the checkpoint's configuration; weights are not needed.

    Raises:
        ModelError: a parameter has another size; the message has its name and both shapes.
    """
    for name, parameter in model.named_parameters():
        stored = seen.stored.get(name)
        if stored is None or stored.packed:
            continue
        if math.prod(stored.shape) != parameter.numel():
            raise ModelError(
                explain_shape(name, seen.folder, stored.shape, parameter.shape)
            )


def is_mtp(name: str, text: Mapping[str, Any] | None = None) -> bool:
    """Whether a tensor belongs to the layers for multi-token prediction.

    Args:
        name: name of the tensor, or a prefix of it.
        text: the decoder's configuration, to find layers whose numbers follow those of the blocks.
    """
    if re.search(r"(^|\.)mtp[._]", name):
        return True
    match = _NUMBERED.match(name)
    if text is None or match is None or any(word in match[0] for word in OTHER_STACKS):
        return False
    return 0 <= int(match[3]) - depth(text) < mtp_layers(text)


def count_mtp_layers(checkpoint: Checkpoint) -> int:
    """Return the number of layers for multi-token prediction, or 0 if none has tensors."""
    return max(1, checkpoint.mtp_layers) if checkpoint.mtp_tensors() else 0


def _refuse_huge(folder: Path, value: Any, key: str = "") -> None:
    """Raise for counts so large that building the configuration alone would fill the memory."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_huge(folder, item, name)
    elif isinstance(value, int) and value > _MOST_COUNTED and _COUNTS.search(key):
        raise ModelError(
            f"{folder / 'config.json'} says {key}={value}; expected at most {_MOST_COUNTED}"
        )


@contextlib.contextmanager
def limit_structure(stored: int | None, what: str) -> Iterator[None]:
    """Raise if a model built on the meta device within the context outgrows its checkpoint.

    Args:
        stored: largest number of weights in its tensors, as `Checkpoint.most_numbers`.
        what: name of the model in messages.

    Raises:
        ModelError: the model has more parameters, or more buffer elements than any family has.
    """
    from torch.nn.modules import module as torch_module

    most = _MOST_WITHOUT_WEIGHTS if stored is None else _MORE * stored + _SPARE
    allowed = {"parameters": most, "buffers": max(most, _MOST_IN_BUFFERS)}
    built = Counter[str]()

    def count(sort: str, owner: object, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or not tensor.is_meta:
            return
        built[sort] += tensor.numel()
        if built[sort] > allowed[sort]:
            raise ModelError(
                f"the config of {what} describes a model with more than {allowed[sort]:,} numbers "
                f"in its {sort}, more than its weights have; the config and the weights do not "
                "belong together"
            )

    with (
        torch_module.register_module_parameter_registration_hook(
            partial(count, "parameters")
        ),
        torch_module.register_module_buffer_registration_hook(
            partial(count, "buffers")
        ),
    ):
        yield
