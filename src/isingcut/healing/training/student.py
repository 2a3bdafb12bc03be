"""The trained model, its distillation loss, and its trained weights.

The student's `forward` is replaced by one that returns the summed divergence, so that all wrappers
(DDP, FSDP, DeepSpeed, autocast, gradient checkpointing) include the loss, and no logits leave the
forward pass.
"""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isingcut.errors import InputError
from isingcut.formats.architectures.blocks import (
    language_model,
    layer_modules,
    text_config,
)
from isingcut.models.compute.divergence import divergence, divergence_from_stream
from isingcut.models.compute.head import find_head_input
from isingcut.models.device import allowance, weight_bytes
from isingcut.models.load import build_skeleton
from isingcut.models.verify import reload
from isingcut.options.heal import HealConfig

# Silences peft's warning, for every layer, about an older name for gradient checkpointing.
_quiet_peft = partial(warnings.catch_warnings, action="ignore", category=FutureWarning)


def load_student(
    folder: Path, config: HealConfig, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a model on the CPU, with weights in ``dtype`` and buffers in float32.

    Raises:
        InputError: the processes of this machine need more memory for it than is free.
    """
    trust = config.trust_remote_code
    needed = weight_bytes(folder, dtype)
    room = allowance("100%", torch.device("cpu")).left
    if needed > room:
        count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        raise InputError(
            f"the student needs {count * needed / 1e9:.3g} GB of host memory "
            f"in {count} processes, {count * room / 1e9:.3g} GB are free; start fewer processes on "
            "this machine, or train less (--method lora)"
        )
    model = reload(folder, dtype=dtype, trust_remote_code=trust)
    if dtype != torch.float32:
        computed = build_skeleton(folder, torch.float32, trust_remote_code=trust)
        for name, buffer in computed.named_buffers():
            if not buffer.is_meta:
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._buffers[leaf] = buffer
    return model


def prepare_training(plain: Any, config: HealConfig) -> Any:
    """Prepare a model for training: all weights, or LoRA matrices."""
    plain.config.use_cache = False
    if config.method == "full":
        plain.requires_grad_(True)
        # What a cut has set to 0 stays 0. Its gradients are 0 but for biases of the last layer.
        for child in (
            part for layer in layer_modules(plain) for part in layer.children()
        ):
            own = list(child.parameters())
            if any(p.ndim > 1 for p in own) and not any(p.any() for p in own):
                child.requires_grad_(False)
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


def set_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert frozen weights to the compute dtype if that changes no value, others to float32.

    Otherwise a frozen float32 weight of a linear layer is cast at every call, and the copy kept for
    the backward pass. Embeddings still return float32, because the residual stream starts there.
    """
    linear = (nn.Linear, Conv1D)
    layers = [
        m for m in model.modules() if isinstance(m, linear) or type(m) is nn.Embedding
    ]
    known = {id(layer) for layer in layers}
    # Weights that layers of other types share, such as Gemma 3's embedding, are not converted.
    others = {
        id(p)
        for m in model.modules()
        if id(m) not in known
        for p in m._parameters.values()
    }
    narrowed = set[int]()
    for layer in layers:
        weight = layer.weight
        if weight.requires_grad or id(weight) in others:
            continue
        half = weight.detach().to(dtype)
        if torch.equal(half.to(weight.dtype), weight):
            weight.data = half
            narrowed.add(id(weight))
            if isinstance(layer, nn.Embedding):
                layer.register_forward_hook(lambda module, args, output: output.float())
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in narrowed:
            parameter.data = parameter.data.float()


def load_trained(
    start: Path, trained: Path, config: HealConfig
) -> dict[str, torch.Tensor]:
    """Return the float32 weights of a training, with LoRA matrices merged.

    Args:
        start: the checkpoint before the training.
        trained: folder that the Trainer saved.
    """
    model = load_student(start if config.lora_rank else trained, config)
    if config.lora_rank:
        import peft

        with _quiet_peft():
            adapted: Any = peft.PeftModel.from_pretrained(model, trained)
            model = adapted.merge_and_unload()
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def split_head(model: Any) -> tuple[Any, Any] | None:
    """Return the decoder and the output layer if ``output(decoder(ids))`` are the model's logits.

    Tested on a few tokens: for a model that scales or caps its logits (Granite, Gemma 2) it returns
    None, and the logits come from the model's own forward pass.
    """
    decoder = model.get_decoder()
    output = model.get_output_embeddings()
    if decoder is None or output is None or decoder is model:
        return None
    ids = torch.arange(5, device=model.device)[None] % int(
        text_config(model).vocab_size
    )
    training = model.training
    model.eval()
    try:
        inputs = find_head_input(
            output, lambda: model(input_ids=ids, use_cache=False).logits
        )
        with torch.no_grad():
            stream = decoder(input_ids=ids, use_cache=False)[0]
        same = inputs is not None and torch.equal(inputs, stream)
    except (TypeError, RuntimeError, AttributeError):
        return None
    finally:
        model.train(training)
    return (decoder, output) if same else None


def install(student: Any, plain: Any, original: Any) -> None:
    """Make ``student(input_ids, attention_mask, ...)`` return ``{"loss": sum over predictions}``.

    Args:
        student: the model to train, perhaps a peft wrapper.
        plain: the transformers model inside it.
        original: the teacher, frozen, on the student's device.
    """
    text = language_model(plain)
    teacher = language_model(original)
    forward = text.forward
    parts = split_head(text)
    other = split_head(teacher)
    size = text.get_output_embeddings().weight.shape[0] if parts else 1

    def read(whole: Any, taken: Any, ids: Tensor, rows: Tensor) -> Tensor:
        """Return the hidden states (n, D) for a head, or the logits (n, V), of the predictions.

        Padding is on the right, where no real token attends to it, so the models need no mask.
        """
        output = (taken[0] if taken else whole)(ids, use_cache=False)
        stream: Tensor = output[0] if taken else output.logits
        return stream[:, :-1][rows.to(stream.device)]

    def teacher_head(stream: Tensor) -> Tensor:
        if not other:
            return stream
        with torch.autocast(stream.device.type, enabled=False):
            logits: Tensor = other[1](stream)
        return logits

    def compute_loss(
        input_ids: Tensor,
        attention_mask: Tensor,
        counted: Tensor | None = None,
        *,
        alone: bool = False,
        **ignored: Any,
    ) -> dict[str, Tensor]:
        """Return the summed divergence from the teacher.

        With ``alone``, return the divergence from itself, to count the student's memory.
        """
        rows = (attention_mask if counted is None else counted)[:, 1:].bool()
        given = read(forward, parts, input_ids, rows)
        head = teacher_head
        if alone:
            target = given.detach()
            head = parts[1] if parts else teacher_head
        else:
            with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
                target = read(teacher, parts and other, input_ids, rows)
        if parts:
            loss = divergence_from_stream(given, parts[1], target, head, size)
        else:
            loss = divergence(given, target)
        return {"loss": loss.to(input_ids.device)}

    student.forward = compute_loss
