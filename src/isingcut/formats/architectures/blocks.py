"""Find the stack of residual blocks of any transformers decoder by its structure.

No forward pass is needed, so a model on the meta device is enough. Kind and costs of a block are
read from its modules and its config. `skip_blocks` runs a model in which some blocks return their
input unchanged: the reference for a cut.

Some models contain a causal language model with embedding, blocks and head. On text it computes the
same as the whole model. BLIP's classes do not run without pixels, so text goes to the language
model inside (`language_model`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.files.runs import BlockCosts
from isingcut.formats.architectures.fields import count_of, first_whole
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.libraries import convert_errors


@dataclass(frozen=True)
class BlockStack:
    """All removable blocks of a model, in the order of the forward pass."""

    path: str
    blocks: tuple[BlockCosts, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every block, in order."""
        return tuple(block.kind for block in self.blocks)

    @property
    def layers(self) -> list[int]:
        """Number of the layer of every block: its own, unless layers are split."""
        return [block.layer for block in self.blocks]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(set(self.layers))

    @property
    def split(self) -> bool:
        """Whether layers are split into sublayers."""
        return self.depth < len(self)

    def remove(self, blocks: Collection[int]) -> Removed:
        """Return the state without these blocks, which may be in any order."""
        layers = self.layers
        stay = {k for i, k in enumerate(layers) if i not in blocks}
        gone = (k for k in dict.fromkeys(layers) if k not in stay)
        halved = {k for i, k in enumerate(layers) if i in blocks} & stay
        mixers = {k for k in halved if layers.index(k) in blocks}
        return Removed(tuple(sorted(blocks)), tuple(gone), mixers, halved - mixers)


class Sublayer(nn.Module):
    """One sublayer of a layer: the layer's own forward, with the other sublayer giving zeros.

    Its children are the modules of the sublayer. The norms of the layer belong to none.

    Attributes:
        muted: the modules of the other sublayer.
        forms: for each of them, an output, and the number of the argument that it gives if all its
            numbers are 0 (it adds to the residual stream itself); None: it gives zeros.
        whole: the forward of the whole layer.
    """

    def __init__(
        self, layer: nn.Module, names: Sequence[str], muted: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, layer.get_submodule(name))
        self.muted = list(muted)
        self.forms: list[tuple[Any, int | None]] = []
        self.whole = layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer without its other sublayer."""
        silent = [_without_numbers(*form) for form in self.forms]
        with replace_forwards(self.muted, silent):
            return self.whole(*args, **kwargs)


def _without_numbers(like: Any, place: int | None) -> Callable[..., Any]:
    several = isinstance(like, (list, tuple))
    width = (like[0] if several else like).shape[-1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if place is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            output = hidden.new_zeros((*hidden.shape[:-1], width))
        else:
            output = args[place]
        return (output, *[None] * (len(like) - 1)) if several else output

    return forward


@contextlib.contextmanager
def replace_forwards(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Replace the `forward` of modules within the context; then restore those set by others."""
    before = [m.__dict__.get("forward") for m in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            if old is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = old


def blocks_in(layer: nn.Module) -> Sequence[nn.Module]:
    """Return the blocks of a layer: itself, or its sublayers if it is split."""
    blocks: Sequence[nn.Module] = layer.__dict__.get("sublayers", (layer,))
    return blocks


def tensor_prefixes(model: Any) -> list[tuple[str, ...]]:
    """Return for each block of a model what the names of its tensors begin with."""
    paths = {module: name for name, module in model.named_modules()}
    return [
        tuple(f"{paths[module]}." for module in modules_of(block))
        for block in stack_modules(model)
    ]


def modules_of(block: nn.Module) -> list[nn.Module]:
    """Return the modules of the model that a block consists of."""
    return list(block.children()) if isinstance(block, Sublayer) else [block]


_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
_MLPS = ("mlp", "feed_forward", "ffn", "fc1", "shared_mlp")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


def describe(module: nn.Module, index: int, path: str, config: Any) -> BlockCosts:
    """Return a block with its kind and its costs.

    Args:
        module: the block.
        index: its position in the stack.
        path: the module path of its layer.
        config: the decoder's configuration.
    """
    parameters = list(module.parameters())
    total = sum(p.numel() for p in parameters)
    mixers = find_mixers(module, int(path.rpartition(".")[2]), config)
    kind = "+".join(filter(None, [*dict.fromkeys(mixers), _feed_forward(module)]))
    return BlockCosts(
        index=index,
        path=path,
        kind=kind or "other",
        parameters=total,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        active_parameters=total - _idle_expert_parameters(module, config),
    )


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False))


def find_mixers(module: nn.Module, layer: int, config: Any) -> list[str]:
    """Return the kinds of all token mixers, outermost first.

    The structure of a module decides, not its name alone. A module named attention that contains a
    recurrence is a recurrence, and a module that contains other mixers is only a wrapper.
    """
    recurrence = _recurrence(module)
    if recurrence is not None:
        return [recurrence]
    inside = [
        m for child in module.children() for m in find_mixers(child, layer, config)
    ]
    name = type(module).__name__.lower()
    # Some attentions contain short convolutions (Inkling); with other mixers it is a wrapper.
    if any(kind != "conv" for kind in inside) or "mask" in name:
        return inside
    children = dict(module.named_children())
    if "shortconv" in name and "conv" in children:
        return ["conv", *inside]
    if _is_attention(name, children):
        return [f"{_span(module, layer, config)}attention", *inside]
    return inside


def _recurrence(module: nn.Module) -> str | None:
    own = _own(module)
    if "recurrent_param" in own:
        return "recurrent"
    if "time_decay" in own and "time_first" in own:
        return "rwkv"
    if any(name.startswith("conv") for name, _ in module.named_children()):
        # The decay may be in a separate module (Kimi Delta Attention) next to the convolution.
        gates = (_own(child) for child in module.children())
        own = next((gate for gate in (own, *gates) if "A_log" in gate), own)
    if "A_log" not in own:
        return None
    if "D" not in own:
        return "linear-attention"
    return "mamba" if own["A_log"].ndim > 1 else "mamba2"


def _is_attention(name: str, children: dict[str, nn.Module]) -> bool:
    if "attention" not in name and "attn" not in name and not name.endswith("mla"):
        return False
    return any(hasattr(c, "weight") or list(c.parameters()) for c in children.values())


def _span(module: nn.Module, layer: int, config: Any) -> str:
    types = getattr(config, "layer_types", None)
    label = types[layer] if isinstance(types, list) and layer < len(types) else ""
    if label:
        return next(
            (f"{span}-" for span in ("sliding", "chunked") if span in label), ""
        )
    window = getattr(module, "sliding_window", None)
    return "sliding-" if isinstance(window, int) and window > 0 else ""


def _feed_forward(block: nn.Module) -> str:
    """Return ``"moe"``, ``"mlp"`` or, without a feed-forward, an empty text."""
    parts = [
        (name, m)
        for name, m in block.named_modules()
        if any(True for _ in m.parameters())
    ]
    names = {name.rpartition(".")[2] for name, _ in parts}
    if "experts" in names:
        return "moe"
    kinds = [type(module).__name__.lower() for _, module in parts]
    named = not names.isdisjoint(_MLPS) or any(
        "mlp" in k or "feedforward" in k for k in kinds
    )
    return "mlp" if named else ""


def _idle_expert_parameters(block: nn.Module, config: Any) -> int:
    """Count the parameters of routed experts that one token does not use."""
    top_k = first_whole(config, _TOP_K)
    idle = 0
    for name, module in block.named_modules():
        if name.rsplit(".", 1)[-1] != "experts":
            continue
        size = sum(p.numel() for p in module.parameters())
        count = _expert_count(module, config)
        if size and count and top_k and top_k < count:
            idle += size - size * top_k // count
    return idle


def _expert_count(module: nn.Module, config: Any) -> int | None:
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacked = next((p.shape[0] for p in module.parameters() if p.ndim == 3), None)
    if stacked is not None:
        return int(stacked)
    return first_whole(config, _EXPERTS)


def text_config(model: Any) -> Any:
    """Return the configuration of the decoder: the model's own, or that of its text part."""
    return model.config.get_text_config(decoder=True)


def layer_config(config: Any, layer: int) -> Any:
    """Return the configuration of a layer: families like Gemma 4 have one for each."""
    several = getattr(config, "is_heterogeneous", False)
    return config.per_layer_config[layer] if several else config


def find_stack(model: nn.Module) -> BlockStack:
    """Find the ModuleList whose items carry the residual stream, and describe every block.

    The list has as many items as the decoder's config has blocks. Among several, lists inside the
    decoder win over lists outside it, then the one with most parameters wins.

    Raises:
        ArchitectureError: the model is an encoder-decoder, or has no such list.
    """
    config = text_config(model)
    for whose, part in (("is", model.config), ("holds", config)):
        if getattr(part, "is_encoder_decoder", False):
            raise ArchitectureError(
                f"{type(model).__name__} {whose} an encoder-decoder: isingcut cuts decoders with "
                "one stack of residual blocks"
            )
    count = count_of(config)
    path = _stack_path(model, count)
    if path is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no block stack: expected a ModuleList of {count} blocks, "
            "as in its config"
        )
    blocks = list[BlockCosts]()
    for i, layer in enumerate(model.get_submodule(path).children()):
        for block in blocks_in(layer):
            own = layer_config(config, i)
            blocks.append(describe(block, len(blocks), f"{path}.{i}", own))
    return BlockStack(path=path, blocks=tuple(blocks))


def layer_modules(model: nn.Module) -> list[nn.Module]:
    """Return the layers of ``model``, in order."""
    return list(model.get_submodule(find_stack(model).path).children())


def stack_modules(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model``, in order."""
    return [block for layer in layer_modules(model) for block in blocks_in(layer)]


def _stack_path(model: nn.Module, count: int | None) -> str | None:
    text: Any = model
    decoder = set(text.get_decoder().modules())
    sizes: dict[str, tuple[bool, int]] = {}
    for path, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and len(module) == count
        # Experts and the like: a list inside a block is not a stack.
        if listed and not any(path.startswith(f"{outer}.") for outer in sizes):
            size = sum(p.numel() for p in module.parameters())
            sizes[path] = module in decoder, size
    return max(sizes, key=lambda path: sizes[path], default=None)


def stop_rescaling(model: Any) -> None:
    """Stop RWKV from halving the stream every few blocks; to be called before its first pass.

    The halving keeps half precision in range and changes nothing except through the epsilon of the
    norms. It happens between the blocks, so blocks that run one at a time would miss it.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "rescale_every", None):
        config.rescale_every = 0


@contextlib.contextmanager
def skip_blocks(model: nn.Module, removed: Sequence[int]) -> Iterator[None]:
    """Skip the removed blocks within the context: each returns its input hidden states.

    The blocks still run, and only their output is replaced, so that caches stay consistent and the
    output keeps its form (tensor or tuple). This is exact but saves no time.
    """
    modules = stack_modules(model)
    with contextlib.ExitStack() as hooks:
        for i in removed:
            hook = modules[i].register_forward_hook(_pass_through, with_kwargs=True)
            hooks.enter_context(hook)
        yield


def _pass_through(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, torch.Tensor):
        return hidden
    return (hidden, *output[1:])


def language_model(model: Any) -> Any:
    """Return the module to run on text: the causal language model inside that contains the blocks,
    or the model itself."""
    if not isinstance(model, nn.Module):
        return model
    inner = [
        (path, module)
        for path, module in model.named_modules()
        if path and getattr(module, "can_generate", bool)()
    ]
    if not inner:
        return model
    stack = find_stack(model)
    return next(
        (module for path, module in inner if stack.path.startswith(f"{path}.")), model
    )


def catch_text_errors(model: Any) -> contextlib.AbstractContextManager[None]:
    """Convert errors of a model on text alone to an error of one line, within the context.

    Raises:
        ArchitectureError: the model failed.
    """
    what = "does not run on text alone, so it cannot be measured or verified"
    return convert_errors(ArchitectureError, f"{type(model).__name__} {what}")
