"""From a checkpoint folder to a frozen model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isingcut.errors import ModelError
from isingcut.models.architectures.auto import auto_class_of
from isingcut.models.checkpoint.read import read_config
from isingcut.models.device import pick_device, pick_dtype
from isingcut.models.fit import bounded_structure, check_fit
from isingcut.models.fp8 import fp8_layout, load_dequantised
from isingcut.models.loading import loading, refuse_incomplete, refuse_infinite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken")


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, with its tokenizer and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    dtype: torch.dtype
    device: torch.device

    @property
    def place(self) -> dict[str, str]:
        """Options of `load` that put another model beside this one, in its dtype."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}


def load(
    folder: Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a resolved folder: evaluation mode, no parameter requires a gradient.

    Attention is transformers' own choice, SDPA wherever the architecture supports it. FP8
    checkpoints are loaded with their weights as plain numbers.

    Args:
        dtype: ``"auto"`` takes bfloat16 where the device computes in it natively (CUDA from
            compute capability 8, CPUs with AMX; with AVX512-BF16 if a short trial finds it faster),
            else float32.
        device: ``"auto"`` takes cuda, then mps, then cpu.

    Raises:
        ModelError: transformers cannot load it; tensors are missing from the checkpoint or have
            other shapes (transformers would invent them at random with a mere warning), or hold
            NaN or infinity; the configuration says another number of blocks.
        CheckpointError: a file is damaged.
        InputError: unknown dtype or a device that is not there.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    seen = check_fit(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with (
        loading(f"the model in {folder}"),
        bounded_structure(seen.most_numbers, str(folder)),
    ):
        model, found = as_transformers_does(
            folder, number, device=place, trust_remote_code=trust_remote_code
        )
    refuse_incomplete(found, folder)
    refuse_infinite(model.named_parameters(), folder)
    model.to(place)
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, Path(folder), number, place)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: it has none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json); copy the model's own into it"
        )
    factory: Any = AutoTokenizer
    with loading(f"the tokenizer in {folder}"):
        found: PreTrainedTokenizerBase = factory.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    return found


def as_transformers_does(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's model in evaluation mode, FP8 and MXFP4 weights as plain numbers.

    Args:
        device: tensors are loaded straight to it, so that several processes of one machine need
            no host memory for a copy each; None leaves them on the CPU.

    Returns:
        the model, and transformers' account of it: tensors that are missing, unexpected or of
        another shape are for the caller to refuse. Whatever transformers raises passes.
    """
    if fp8_layout(folder, read_config(folder)):
        return load_dequantised(folder, dtype)
    loader = auto_class_of(folder, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    packed = read_config(folder).get("quantization_config") or {}
    if packed.get("quant_method") == "mxfp4":
        from transformers.utils.quantization_config import Mxfp4Config

        # Else what is measured depends on the kernels that are installed.
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model, found = loader.from_pretrained(
        folder,
        **options,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model.eval(), found
