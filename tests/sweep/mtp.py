"""Layers for multi-token prediction (MTP) in a tiny checkpoint, and whether a cut keeps them."""

import re
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from isingcut.formats.architectures.cuts import depth, mtp_layers, read_decoder
from isingcut.formats.architectures.fields import MTP, text_part
from isingcut.formats.checkpoints import Checkpoint
from isingcut.models.verify import random_tokens
from shared import load_json, save_json
from tiny import relative_difference, skip_blocks

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class MtpLayers:
    """The MTP layers of a checkpoint.

    Args:
        prefix: start of the names of their tensors, before the layer number.
        numbered_on: whether their numbers continue those of the blocks.
        count: number of MTP layers.
        runs: whether transformers drafts tokens with them.
    """

    prefix: str
    numbered_on: bool
    count: int
    runs: bool

    def name(self, number, depth):
        """Return the prefix of the tensors of one layer, in a model of ``depth`` blocks."""
        return f"{self.prefix}{number + depth * self.numbered_on}."


def add_mtp_layers(model, folder):
    """Give a saved tiny checkpoint random MTP layers, in the form of its architecture.

    Returns:
        the layers, or None for an architecture that has none.
    """
    patterns = [
        p
        for p in getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()
        if re.search(r"mtp|layers\\*\.\d", p)
    ]
    text = model.config.get_text_config(decoder=True)
    if not patterns and not any(hasattr(text, field) for field in MTP):
        return None
    config = load_json(folder / "config.json")
    count = 1 if text.model_type == "mellum" else 2  # Mellum allows only one.
    _write_fields(config, text, count)
    save_json(folder / "config.json", config)
    checkpoint = Checkpoint.read(folder)
    n = checkpoint.depth
    blocks = checkpoint.prefix
    own = next(
        (m[0] for p in patterns if (m := re.search(r"(model\\\.)?mtp\w*", p))), None
    )
    prefix = blocks if own is None else own.replace("\\", "") + ".layers."
    tensors = load_file(folder / "model.safetensors")
    weights = _random_weights(model, folder, count)
    found = MtpLayers(prefix, own is None, count, weights is not None)
    if weights is None:
        last = f"{blocks}{n - 1}."
        block = {
            name.removeprefix(last): t
            for name, t in tensors.items()
            if name.startswith(last)
        }
        block["eh_proj.weight"] = torch.zeros(8, 16)
        weights = {
            f"layers.{i}.{name}": t for i in range(count) for name, t in block.items()
        }
    for name, tensor in weights.items():
        match = re.fullmatch(r"layers\.(\d+)\.(?:mtp_block\.)?(.*)", name)
        new = found.name(int(match[1]), n) + match[2] if match else f"{own}.{name}"
        tensors[new.replace("\\", "")] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return found


def _write_fields(config, text, count):
    """Set the fields of a configuration for MTP layers, of the same type as the last block."""
    part = text_part(config)
    known = [field for field in MTP if hasattr(text, field)]
    part.update(dict.fromkeys(known[:1] or ["num_nextn_predict_layers"], count))
    for name in known[1:]:
        part.pop(name, None)
    for listed in ("layer_types", "mlp_layer_types"):
        settable = not isinstance(getattr(type(text), f"mtp_{listed}", None), property)
        if "num_mtp_layers" in known and settable and getattr(text, listed, None):
            part[f"mtp_{listed}"] = [getattr(text, listed)[-1]] * count


def _random_weights(model, folder, count):
    """Return random weights of transformers' MTP model, or None if it does not support this one."""
    try:
        torch.manual_seed(1)
        mtp = MtpModel(type(model).from_pretrained(folder), count)
    except (AttributeError, ValueError):
        return None
    shared = ("embed_tokens.", "shared_head.")
    with torch.no_grad():
        for parameter in mtp.layers.parameters():
            parameter.normal_(std=0.2)
    return {
        name: t for name, t in mtp.state_dict().items() if not name.startswith(shared)
    }


def check_mtp_layers(found, model, removed, source, cut):
    """Check that a cut keeps the MTP layers, and that their drafts are those of the original with
    the removed blocks skipped.

    Args:
        found: result of `add_mtp_layers` for ``source``.
        model: a model of the class that loads both.
        removed: blocks that ``cut`` lacks.

    Returns:
        whether transformers generates with them, in which case the tokens were compared as well.
    """
    before = _tensors(source)
    after = _tensors(cut)
    old, new = (depth(read_decoder(_config(folder))) for folder in (source, cut))
    assert mtp_layers(read_decoder(_config(cut))) == found.count, (
        "the configuration lost them"
    )
    for number in range(found.count):
        name = found.name(number, old)
        kept = {
            n.removeprefix(name): t for n, t in before.items() if n.startswith(name)
        }
        assert kept, f"no tensor begins with {name}"
        for rest, tensor in kept.items():
            assert torch.equal(after[found.name(number, new) + rest], tensor), (
                f"{name}{rest}"
            )
    if not found.runs:
        return False
    whole, smaller = (_load(model, found, folder) for folder in (source, cut))
    try:
        MtpModel.from_pretrained(whole)
    except RuntimeError:
        return False  # transformers cannot load the original's either.
    tokens = random_tokens(model, 1, 12)
    with skip_blocks(whole, removed):
        expected = _draft(whole, tokens)
    difference = relative_difference(expected, _draft(smaller, tokens))
    assert difference <= _TOLERANCE, f"the drafts differ by {difference:.1e}"
    if smaller._is_stateful:
        return False  # transformers does not generate with drafts for these.
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    greedy = smaller.generate(tokens, **how)
    assert torch.equal(smaller.generate(tokens, use_mtp=True, **how), greedy), (
        "generation differs"
    )
    return True


def _config(folder):
    return load_json(folder / "config.json")


def _tensors(folder):
    return {
        n: t
        for file in folder.glob("*.safetensors")
        for n, t in load_file(file).items()
    }


def _load(model, found, folder):
    loaded = type(model).from_pretrained(folder)
    if found.numbered_on:
        # The class lists the layer numbers of one released model.
        first = depth(read_decoder(_config(folder)))
        numbers = "|".join(str(first + i) for i in range(found.count))
        loaded._keys_to_ignore_on_load_unexpected = [
            rf"{re.escape(found.prefix)}({numbers})\."
        ]
    return loaded.eval()


@torch.no_grad()
def _draft(model, tokens):
    """Return the logits of the drafts (1, MTP layers, V) after the tokens (1, L)."""
    hidden = model(
        input_ids=tokens, output_hidden_states=True, use_cache=False
    ).hidden_states[-1]
    positions = torch.arange(1, tokens.shape[1])[None]
    mtp = MtpModel.from_pretrained(model)
    _, logits, _ = mtp(tokens[:, 1:], hidden[:, :-1], None, positions, None)
    return logits
