"""The model that is trained, and what came out of its training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from isingcut.healing.checks import check_last
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.cutting.verify import reload
from isingcut.models.text_alone import text_model
from isingcut.options.config import HealConfig


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft asks models by an older name whether they recompute activations: a warning a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_student(folder: Path, config: HealConfig) -> Any:
    """A model with float32 weights, on the CPU."""
    return reload(folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code)


def prepare_training(plain: Any, config: HealConfig) -> Any:
    """The model with what is trained of it: all weights, the last ones, or small matrices beside.

    Raises:
        InputError: fewer blocks than are to be trained.
    """
    plain.config.use_cache = False
    if config.method == "full":
        return plain.requires_grad_(True)
    if config.last is not None:
        check_last(config, len(find_stack(plain)))
        plain.requires_grad_(False)
        for parameter in last_parameters(plain, config.last):
            parameter.requires_grad_(True)
        return plain
    import peft

    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with _quiet_peft():
        return peft.get_peft_model(plain, settings)


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained as training computes with it, where that changes no value.

    A frozen float32 weight of a linear layer would be cast anew at every call, and the copy kept
    for the backward pass. What an embedding gives is float32 still: it begins the stream.
    """
    linear = (nn.Linear, Conv1D)
    layers = [m for m in model.modules() if isinstance(m, linear) or type(m) is nn.Embedding]
    known = {id(layer) for layer in layers}
    # Other layers may compute with the weight that is tied to theirs, as Gemma 3's embedding does.
    others = {id(p) for m in model.modules() if id(m) not in known for p in m._parameters.values()}
    for layer in layers:
        weight = layer.weight
        if weight.requires_grad or id(weight) in others:
            continue
        narrowed = weight.detach().to(dtype)
        if torch.equal(narrowed.to(weight.dtype), weight):
            weight.data = narrowed
            if isinstance(layer, nn.Embedding):
                layer.register_forward_hook(lambda module, args, output: output.float())


def last_parameters(model: Any, blocks: int) -> list[nn.Parameter]:
    """The weights of the last blocks and of what comes behind them, the final norm and the head.

    A head that is tied to the embeddings is not among them: the first block reads it, too. What
    comes before needs no gradients, so that no backward pass goes there.
    """
    stack = stack_modules(model, find_stack(model))
    read = text_model(model)
    first = {id(p) for p in read.get_input_embeddings().parameters()}
    within = [p for block in stack[-blocks:] for p in block.parameters()]
    return within + [p for p in _behind(read, stack[-1]) if id(p) not in first]


def _behind(model: Any, block: nn.Module) -> list[nn.Parameter]:
    """The weights that what leaves a block meets: those which have a gradient from there on."""

    def begin(_: Any, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        new = hidden.detach().requires_grad_()
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    parameters = list(model.parameters())
    needed = [p.requires_grad for p in parameters]
    model.requires_grad_(True)
    handle = block.register_forward_hook(begin)
    ids = torch.zeros((1, 4), dtype=torch.long, device=model.device)
    try:
        with torch.enable_grad():
            total = model(input_ids=ids, use_cache=False).logits.float().sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        handle.remove()
        for parameter, before in zip(parameters, needed, strict=True):
            parameter.requires_grad_(before)
    return [p for p, g in zip(parameters, found, strict=True) if g is not None]


def trained_weights(start: Path, trained: Path, config: HealConfig) -> dict[str, torch.Tensor]:
    """The float32 weights that a training left, small matrices merged into their layers.

    Args:
        start: the checkpoint that was trained.
        trained: what the Trainer saved of it.
    """
    model = load_student(start if config.lora_rank else trained, config)
    if config.lora_rank:
        import peft

        with _quiet_peft():
            adapted: Any = peft.PeftModel.from_pretrained(model, trained)
            model = adapted.merge_and_unload()
    found: dict[str, torch.Tensor] = model.state_dict()
    return found
