"""Load a frozen model from a checkpoint folder, with or without weights (a skeleton)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isingcut.console.progress import Progress, silent
from isingcut.data.calibration import Calibration, TextSampler
from isingcut.data.chat import ChatWriter
from isingcut.errors import NOT_FINITE, ArchitectureError, IsingcutError, ModelError
from isingcut.formats.architectures.blocks import (
    BlockStack,
    find_stack,
    language_model,
    stop_rescaling,
    text_config,
)
from isingcut.formats.checkpoints import Checkpoint, is_mtp, limit_structure
from isingcut.formats.fp8 import dequantise_checkpoint, fp8_layout, weights_of
from isingcut.formats.gguf_files import cache_folder
from isingcut.formats.libraries import (
    catch_errors,
    refuse_incomplete,
    refuse_infinite,
    report_missing_kernels,
)
from isingcut.formats.safetensors_files import read_config
from isingcut.formats.sources import model_identity
from isingcut.formats.transformers_private import Names, model_classes
from isingcut.models.device import pick_device, pick_devices, pick_dtype, weight_bytes
from isingcut.models.placement import connect, place, place_of
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.models.sublayers import check_sublayers, split_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_auto_class(config: Any) -> Any:
    """Return the auto class that builds the model in a configuration's ``architectures``.

    Without ``architectures`` it is the causal class, if this supports ``config``. A multimodal
    model that the image-text-to-text class builds has a text decoder, which is run on text alone.

    Args:
        config: a loaded configuration.

    Raises:
        ArchitectureError: neither class supports the configuration.
    """
    import transformers

    factories: list[Any] = [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    ]
    remote = getattr(config, "auto_map", None) or {}
    # The causal class of a multimodal checkpoint may fit only its text part.
    saved = getattr(config, "architectures", None) or []
    known = [f for f in factories if type(config) in model_classes(f)]
    fitting = [f for f in factories if f.__name__ in remote]
    fitting += [f for f in known if model_classes(f)[type(config)].__name__ in saved]
    fitting += known
    if fitting:
        return fitting[0]
    raise ArchitectureError(
        f"transformers has no text-generating decoder of the model type {config.model_type!r}; "
        "isingcut cuts decoders with one stack of residual blocks"
    )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's configuration with transformers.

    Raises:
        CheckpointError: the configuration is missing or damaged.
        ModelError: transformers cannot read the configuration, or that of `generate`.
    """
    from transformers import AutoConfig, GenerationConfig

    configs: Any = AutoConfig
    # Checked first, because transformers would look for a deleted folder on the hub.
    read_config(folder)
    with catch_errors(f"the configuration in {folder}"):
        config = configs.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        # The weights are loaded much later, and then fail on it.
        with catch_errors(f"generation_config.json in {folder}"):
            GenerationConfig.from_pretrained(folder)
    return config


_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "vocab.*",
    "*.tiktoken",
)


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, with its tokenizer and source.

    Attributes:
        device: device of the input; the first one of several.
        trusted: whether the model's own Python code may run.
        streamed: its `StreamedReplay`, if the model is without weights; else None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    dtype: torch.dtype
    device: torch.device
    trusted: bool = False
    streamed: Any = None

    @property
    def runnable(self) -> Any:
        """The model; if it is without weights, its `StreamedReplay`."""
        return self.streamed or self.model

    @cached_property
    def replay(self) -> Replay:
        """The model's blocks, to run one at a time."""
        return self.streamed or Replay(self.model)

    @cached_property
    def stack(self) -> BlockStack:
        """The model's blocks."""
        return find_stack(self.model)

    def sampler(
        self,
        length: int,
        seed: int,
        *,
        tokens: int = 0,
        used: Calibration | None = None,
        progress: Progress = silent,
    ) -> TextSampler:
        """Return the sampler of texts for this model, which writes the text ``"chat"`` itself.

        Args:
            length, seed, used: as in `TextSampler`.
            tokens: tokens that are read, for the progress bar of ``"chat"``.
        """
        model = language_model(self.model)
        chat = ChatWriter(
            model,
            self.tokenizer,
            lambda: str(model_identity(self.folder)["sha256"]),
            cache_folder("chat"),
            progress,
            tokens,
        )
        return TextSampler(self.tokenizer, length, seed, model, used, chat)

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, as an option of `load`."""
        return str(self.dtype).removeprefix("torch.")


def load(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    split: bool = False,
) -> LoadedModel:
    """Load a model from a resolved folder, in evaluation mode and with frozen parameters.

    transformers chooses the attention implementation: SDPA if the architecture supports it. The
    weights of FP8 checkpoints are dequantised.

    Args:
        dtype, device: as in `pick_dtype` and `pick_devices`.
        split: whether the sublayers of each layer are the blocks, see `split_layers`.

    Raises:
        ModelError: transformers cannot load the model; tensors are missing from the checkpoint or
            have other shapes (transformers would only warn and use random values); or the
            configuration has another number of blocks.
        CheckpointError: a file is damaged, or a tensor has NaN or infinity.
        InputError: the dtype is unknown or the device does not exist.
        ArchitectureError: its layers cannot be split into sublayers.
    """
    number = pick_dtype(dtype, pick_device(device))
    trust = trust_remote_code
    seen = Checkpoint.read(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    devices = pick_devices(device, weight_bytes(folder, number))
    places = dict[str, torch.device]()
    tensors = {"": devices[0]}
    if len(devices) > 1:
        empty = build_on_meta(seen, trust_remote_code=trust)[0]
        places = place(empty, devices)
        names = (*empty.state_dict(), *(name for name, _ in empty.named_buffers()))
        tensors = {name: place_of(name, places) for name in names}
    with (
        catch_errors(f"the model in {folder}"),
        limit_structure(seen.most_numbers, str(folder)),
    ):
        model, report = load_plain(
            folder, number, places=tensors, trust_remote_code=trust
        )
    refuse_incomplete(report, folder)
    refuse_infinite(model.named_parameters(), folder)
    if not places:
        model.to(devices[0])
    connect(model, places)
    freeze(model)
    if split:
        split_layers(model)
        check_sublayers(model)
    reuse_freed_memory()
    if devices[0].type != "cpu":
        report_missing_kernels()
    return LoadedModel(model, tokenizer, folder, number, devices[0], trust)


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: the folder has no tokenizer, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json); copy the model's tokenizer into it"
        )
    factory: Any = AutoTokenizer
    with catch_errors(f"the tokenizer in {folder}"):
        tokenizer: PreTrainedTokenizerBase = factory.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    return tokenizer


def load_plain(
    folder: Path,
    dtype: torch.dtype,
    *,
    places: Mapping[str, torch.device] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint as transformers does; FP8 and MXFP4 weights are dequantised.

    Args:
        places: device of each tensor, or of all (""); None: the CPU. Tensors are loaded directly to
            a GPU, so that several processes of one machine need no copy each in host memory.

    Returns:
        the model and transformers' loading info. Callers must check it for tensors that are
        missing, unexpected or of another shape. Errors of transformers are not converted.
    """
    from accelerate.hooks import remove_hook_from_module

    raw = read_config(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    loader = find_auto_class(config)
    source = folder if fp8_layout(folder, raw) is None else None
    options: dict[str, Any] = {}
    if source is None:
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            # The auto class takes no tensors, and does not list classes of a model's own code.
            loader = type(
                loader.from_config(config, trust_remote_code=trust_remote_code)
            )
        weights = dict(dequantise_checkpoint(folder, raw, dtype))
        options = {"config": config, "state_dict": weights}
    elif places and all(device.type != "cpu" for device in places.values()):
        options["device_map"] = dict(places)
    if (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        from transformers.utils.quantization_config import Mxfp4Config

        # Otherwise measurements would depend on the installed kernels.
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model, report = loader.from_pretrained(
        source,
        **options,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # Hooks of accelerate move the input of every layer, and the logits back to the first device.
    remove_hook_from_module(model, recurse=True)
    _prepare(model, folder)
    return model, report


def _prepare(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    model.eval()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    stop_rescaling(model)
    # A configuration may ask for tuples.
    for config in (model.config, text_config(model)):
        config.return_dict = True


def build_on_meta(
    seen: Checkpoint, *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Build a checkpoint's model without weights, with a size limited by its stored tensors.

    Returns:
        the model on the meta device, and its configuration.

    Raises:
        ModelError: transformers cannot build the model, or it is larger than its checkpoint.
    """
    config = load_config(seen.folder, trust_remote_code=trust_remote_code)
    # Quantisation kernels need a GPU, but building the structure does not.
    config.__dict__.pop("quantization_config", None)
    bounds = limit_structure(seen.most_numbers, str(seen.folder))
    with catch_errors(f"the model in {seen.folder}"), bounds, torch.device("meta"):
        model = find_auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model, config


def find_unused(seen: Checkpoint, model: Any) -> list[str]:
    """List the stored tensors that a model does not use, such as the value head of a reward model.

    Layers for multi-token prediction, and old buffers that transformers ignores too, do not count.

    Args:
        seen: the checkpoint; the tensors of packed weights have other names, and are not compared.
        model: the model of its configuration; its weights are not needed.
    """
    fp8 = fp8_layout(seen.folder, seen.config) is not None
    if seen.config.get("quantization_config") and not fp8:
        return []
    names = Names(model, torch.float32)
    return [
        name
        for name in (weights_of(seen.stored) if fp8 else seen.stored)
        if not names.is_known(names.target(name)[0]) and not is_mtp(name, seen.text)
    ]


def explain_unused(names: Sequence[str]) -> str:
    """Return the warning that the tensors of `find_unused` are not in the cut."""
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return f"the cut has no {shown}: the model's class does not use these tensors of the original"


def build_skeleton(
    folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Any:
    """Build the model of a checkpoint folder: parameters on the meta device, buffers with values.

    Args:
        dtype: dtype of floating-point parameters, except those that the family keeps in float32.

    Raises:
        ModelError: transformers cannot build the model, configuration and tensors do not match,
            or the weights are packed in a way that can only be loaded whole.
    """
    from accelerate import init_empty_weights

    seen = Checkpoint.read(folder)
    packed = seen.config.get("quantization_config")
    if packed and not fp8_layout(folder, seen.config):
        method = packed.get("quant_method") or packed.get("quant_algo") or "unknown"
        raise ModelError(
            f"the weights in {folder} are packed by {method!r} and cannot be streamed; "
            "pass --stream off, or give a checkpoint in bfloat16, float32 or FP8"
        )
    # Built on the meta device first, because buffers need memory below.
    config = build_on_meta(seen, trust_remote_code=trust_remote_code)[1]
    config.name_or_path = str(folder)
    with catch_errors(f"the model in {folder}"):
        # Buffers are computed, because checkpoints lack those of rotary frequencies and masks.
        with (
            init_empty_weights(include_buffers=False),
            torch.random.fork_rng(devices=[]),
        ):
            model = find_auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
        _prepare(model, folder)
    freeze(model)
    return model


def freeze(model: Any) -> None:
    """Freeze a model's parameters, and pass its head a batch of positions as a matrix.

    `generate` gives the head the last positions alone, a view with gaps. For such a view PyTorch
    multiplies frozen weights once per sample, and in bfloat16 on a CPU copies them each time
    (https://github.com/pytorch/pytorch/issues/186148).
    """
    model.requires_grad_(False)
    if head := language_model(model).get_output_embeddings():
        head.register_forward_pre_hook(_fold)


def _fold(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    stream, *rest = given
    return stream.flatten(0, -2).contiguous().view(stream.shape), *rest


_SHOWN = 12


def explain_nan(
    model: Any, what: str, ids: Sequence[int], removed: Sequence[int] = ()
) -> ModelError:
    """Return the error for a NaN or infinite value of a model.

    Args:
        what: name of the value, for example ``"the loss"``.
        ids: tokens of the text that it was computed on; the first few are shown, as text if the
            model's folder has a tokenizer.
        removed: blocks that the model ran without.
    """
    name = getattr(model, "name_or_path", "") or type(model).__name__
    first = list(ids[:_SHOWN])
    shown: Any = first
    with contextlib.suppress(IsingcutError):
        shown = load_tokenizer(Path(name)).decode(first)
    without = f" without blocks {', '.join(map(str, removed))}" if len(removed) else ""
    return ModelError(
        f"{what} of {name}{without} is NaN or infinite on the text that begins {shown!r}; "
        + NOT_FINITE
    )
