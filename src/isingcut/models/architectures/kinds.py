"""What one block is and what it costs, read from its modules and its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isingcut.models.architectures.base import Block

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
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


def describe(module: nn.Module, index: int, path: str, config: Any) -> Block:
    """The block's kind and its costs.

    Args:
        module: the block.
        index: its position in the stack.
        path: its module path.
        config: the decoder's configuration.
    """
    parameters = {id(p): p for p in module.parameters()}.values()
    total = sum(p.numel() for p in parameters)
    mixers = _mixers(module, index, config)
    names = list(dict.fromkeys(name for name, _, _ in mixers if name))
    feed_forward = _feed_forward(module)
    kind = "+".join([*names, *([feed_forward] if feed_forward else [])]) or "other"
    return Block(
        index=index,
        path=path,
        kind=kind,
        parameters=total,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        active_parameters=total - _idle_expert_parameters(module, config),
        kv_bytes_per_token=sum(kv for _, kv, _ in mixers),
        state_bytes=sum(state for _, _, state in mixers),
    )


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False))


def _itemsize(module: nn.Module) -> int:
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.element_size() >= 2:
            return parameter.element_size()
    return 2


def _mixers(module: nn.Module, index: int, config: Any) -> list[tuple[str, int, int]]:
    """(kind, KV bytes per token, state bytes) of all that mixes tokens, outermost first.

    What a module does decides, and not its name alone: one that is called attention and holds a
    recurrence is that recurrence, and one that holds other mixers only wraps them.
    """
    recurrence = _recurrence(module)
    if recurrence is not None:
        return [recurrence]
    inside = [m for child in module.children() for m in _mixers(child, index, config)]
    name = type(module).__name__.lower()
    keys = getattr(module, "wk", None)
    if "indexer" in name and isinstance(keys, nn.Linear):
        inside.append(("", keys.out_features * _itemsize(module), 0))
    # Short convolutions stand inside some attentions (Inkling); what holds more only wraps it.
    if any(kind not in ("", "conv") for kind, _, _ in inside) or "mask" in name:
        return inside
    children = dict(module.named_children())
    if "shortconv" in name and "conv" in children:
        return [("conv", 0, _conv_state(children["conv"]) * _itemsize(module)), *inside]
    if _is_attention(name, children):
        kind = f"{_span(module, index, config)}attention"
        return [(kind, _kv_elements(module, config) * _itemsize(module), 0), *inside]
    return inside


def _recurrence(module: nn.Module) -> tuple[str, int, int] | None:
    own = _own(module)
    if "A_log" in own or ("time_decay" in own and "time_first" in own):
        return _recurrent(module, own, _itemsize(module))
    if "recurrent_param" in own:
        return "recurrent", 0, own["recurrent_param"].numel() * _itemsize(module)
    # Its decay may be a module of its own (Kimi Delta Attention), beside the convolution.
    gate = next((g for c in module.children() if "A_log" in (g := _own(c))), None)
    if gate is not None and any(name.startswith("conv") for name, _ in module.named_children()):
        return _recurrent(module, gate, _itemsize(module))
    return None


def _is_attention(name: str, children: dict[str, nn.Module]) -> bool:
    if "attention" not in name and "attn" not in name and not name.endswith("mla"):
        return False
    linears = [c for c in children.values() if hasattr(c, "weight") or list(c.parameters())]
    return bool(linears)


def _span(module: nn.Module, index: int, config: Any) -> str:
    types = getattr(config, "layer_types", None)
    label = types[index] if isinstance(types, list) and index < len(types) else ""
    if "sliding" in label:
        return "sliding-"
    if "chunked" in label:
        return "chunked-"
    if label:
        return ""
    window = getattr(module, "sliding_window", None)
    return "sliding-" if isinstance(window, int) and window > 0 else ""


def _recurrent(module: nn.Module, own: dict[str, torch.Tensor], size: int) -> tuple[str, int, int]:
    convolution = next((c for n, c in module.named_children() if n.startswith("conv")), None)
    conv = _conv_state(convolution) if convolution is not None else 0
    if "A_log" not in own:
        return "rwkv", 0, 5 * own["time_decay"].numel() * size
    if "D" not in own:  # gated delta rule: a key x value matrix per head
        heads = own["A_log"].numel()
        width = getattr(module, "head_dim", 0)
        key, value = (int(getattr(module, f"head_{s}_dim", width)) for s in "kv")
        return "linear-attention", 0, (conv + heads * key * value) * size
    if own["A_log"].ndim > 1:
        return "mamba", 0, (conv + own["A_log"].numel()) * size
    heads = own["A_log"].numel()
    state = heads * int(getattr(module, "head_dim", 0)) * int(getattr(module, "ssm_state_size", 0))
    return "mamba2", 0, (conv + state) * size


def _conv_state(convolution: nn.Module) -> int:
    weight = getattr(convolution, "weight", None)
    return weight.shape[0] * weight.shape[-1] if isinstance(weight, torch.Tensor) else 0


def _kv_elements(module: nn.Module, config: Any) -> int:
    """Key and value numbers that transformers caches for one token in one attention."""
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    widths = [getattr(p, "out_features", None) for p in projections if p is not None]
    if widths and all(isinstance(w, int) for w in widths):
        # Without a value projection the keys serve as values (or the layer reads another's).
        return sum(int(w) for w in widths if w is not None) * (2 if len(widths) == 1 else 1)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        groups = 1
    if getattr(config, "kv_lora_rank", None):
        key = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return heads * (key + int(config.v_head_dim))
    width = int(getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    return 2 * groups * width


def _feed_forward(block: nn.Module) -> str | None:
    experts = any(
        name.rsplit(".", 1)[-1] == "experts" and list(module.parameters())
        for name, module in block.named_modules()
    )
    if experts:
        return "moe"
    for name, module in block.named_modules():
        last = name.rsplit(".", 1)[-1]
        kind = type(module).__name__.lower()
        if (
            "mlp" in kind
            or "feedforward" in kind
            or last in {"mlp", "feed_forward", "ffn", "fc1", "shared_mlp"}
        ) and list(module.parameters()):
            return "mlp"
    return None


def _idle_expert_parameters(block: nn.Module, config: Any) -> int:
    """Parameters of routed experts that one token does not visit."""
    top_k = next((v for k in _TOP_K if isinstance(v := getattr(config, k, None), int)), None)
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
    return next((v for k in _EXPERTS if isinstance(v := getattr(config, k, None), int)), None)
