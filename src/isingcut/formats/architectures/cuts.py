"""Cut a checkpoint's configuration, a JSON dictionary: per-layer fields and module names."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.errors import ArchitectureError
from isingcut.formats.architectures import families, fields
from isingcut.formats.architectures.fields import (
    COUNTED_BY,
    PER_MODALITY,
    UNCUTTABLE,
    counted_by,
    decoder_object,
    of_type,
    text_part,
)
from isingcut.ising.constraints import LinearConstraint

if TYPE_CHECKING:
    from isingcut.formats.architectures.blocks import BlockStack

_KNOWN = {
    *fields.WRITTEN_OUT,
    *fields.MAPS,
    *fields.SLICE_OR_SCALAR,
    *fields.GENERATORS,
    *fields.DEEPSTACK,
    *fields.IMAGE_ENTRIES,
    *fields.NOT_PER_LAYER,
}
# Names of fields that may count or index blocks; layer norms, layer drop and layer scales do not.
_BLOCKS = r"(^|_)(layers?|blocks?|depth)(_(?!norm|drop|scale)|$)"
_COUNTS = re.compile(_BLOCKS)
_LAYERISH = re.compile(rf"{_BLOCKS}|_idx|_ids$|indices|idxs|indexes|deepstack")
_PERIODISH = re.compile(
    r"layer.*(period|offset|interval|freq|step|every|_index)|(period|interval|every).*layer"
)
_PATTERNISH = re.compile(r"pattern|types|layers|blocks")
# Outside the decoder's part, names with these words count something else.
_ELSEWHERE = re.compile(
    r"vision|visual(?!_index)|image|video|audio|speech|vit|tower|encoder|projector|connector|"
    r"resampler|adapter|former|merger|mtp|nextn|perceiver"
)

# A part of a configuration that has one of these fields is another model with its own blocks.
_OWN = {*fields.COUNT, "depth", "depths", "num_layer", "encoder_layers", "model_type"}
# Parts that other code renumbers, or that do not describe blocks.
_CLOSED = {"quantization_config", "mtp_config", *fields.MAPS, *fields.NOT_PER_LAYER}


def refuse_unknown(
    part: Mapping[Any, Any], count: int, mtp: int, *, decoder: bool
) -> None:
    """Raise if a field that is not in the tables seems to count or index blocks.

    Args:
        part: a part of a configuration whose fields describe the decoder's blocks.
        count: number of blocks of the decoder.
        mtp: number of MTP layers, as from `mtp_layers`; some lists have entries for these as well.
        decoder: whether it is the decoder's part or inside it; elsewhere list lengths do not count.

    Raises:
        ArchitectureError: there is such a field; the message names it.
    """
    for key, value in part.items():
        # Configuration objects may have keys of another type.
        if not isinstance(key, str) or key in _KNOWN or key.startswith("_"):
            continue
        if "token_id" in key or (not decoder and _ELSEWHERE.search(key)):
            continue
        lengths = {count, count + mtp} if decoder else set()
        if _speaks_of_blocks(key, value, count, lengths):
            raise ArchitectureError(
                f"the configuration field {key!r} looks per-layer (value {value!r:.60}), but "
                "isingcut does not know it; add it to architectures/fields.py"
            )


def _speaks_of_blocks(key: str, value: Any, count: int, lengths: set[int]) -> bool:
    if type(value) is int:
        periodish = value > 1 and _PERIODISH.search(key)
        return bool(periodish or (value > 0 and _COUNTS.search(key)))
    layerish = bool(_LAYERISH.search(key))
    if isinstance(value, (list, tuple)):
        rows = (item if isinstance(item, (list, tuple)) else [item] for item in value)
        flat = [*itertools.chain.from_iterable(rows)]
        numbers = all(type(i) is int and -count <= i <= count for i in flat)
        return len(value) in lengths or (layerish and numbers and bool(flat))
    if isinstance(value, dict):
        return layerish and bool(value) and all(str(k).isdigit() for k in value)
    if isinstance(value, str):
        listed = layerish and re.fullmatch(r"\d+(,\d+)+", value)
        pattern_like = len(value) in lengths and _PATTERNISH.search(key)
        return bool(listed or pattern_like)
    return False


def find_parts(
    config: dict[str, Any], text: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the parts of a configuration that describe the decoder's blocks.

    These are the decoder's part, the root, and the parts inside them that are not other models.
    The second value is whether a part is the decoder's or inside it.

    Args:
        config: the whole configuration.
        text: the decoder's part of it.
    """
    for root in [text] if config is text else [text, config]:
        for part in (root, *_within(root, text)):
            yield part, root is text


def _within(part: dict[str, Any], text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in part.items():
        if not isinstance(value, dict) or value is text or key in _CLOSED:
            continue
        if not _OWN & value.keys():
            yield value
            yield from _within(value, text)


def cut_fields(part: dict[str, Any], count: int, mapping: dict[int, int]) -> None:
    """Change, in place, the per-layer fields of one part of a configuration.

    Args:
        part: as from `find_parts`.
        count: number of blocks before the cut.
        mapping: new number of each kept block, by its old number; also of MTP layers that stay and
            whose numbers follow those of the blocks.

    Raises:
        ArchitectureError: a field has another form than in the tables, a list is too short, or a
            period lacks the list that replaces it.
    """
    model_type = part.get("model_type", "")
    _, often = of_type(COUNTED_BY, model_type) or ("", 1)
    per_modality = of_type(PER_MODALITY, model_type) or ()
    for key, value in part.items():
        if value is None or key in per_modality:
            continue
        with fields.catch_unknown_form(key, value):
            part[key] = _cut_field(key, value, count, mapping, often)
    _drop_generators(part)


def _cut_field(
    key: str, value: Any, count: int, mapping: dict[int, int], often: int
) -> Any:
    """Return the value of a field after the cut. Errors of an unknown form are not converted."""
    kept = [i for i in mapping if i < count]
    gone = [i for i in range(count) if i not in mapping]
    if key in fields.COUNT and value in (count, count * often):
        return value // count * len(kept)
    listed = isinstance(value, list) and key in fields.SLICE_OR_SCALAR
    if listed or key in fields.SLICE:
        return _slice_field(key, value, mapping, count)
    if key in fields.INDICES:
        return _renumber_list(value, mapping, first=0)
    if key in fields.INDICES_FROM_1:
        return _renumber_list(value, mapping, first=1)
    if key in fields.SOURCES:
        return [mapping[i] for i in _slice_field(key, value, mapping, count)]
    if key in fields.MAPS:
        return {str(mapping[int(k)]): v for k, v in value.items() if int(k) in mapping}
    if key in fields.PREFIX:
        return _change_each(value, lambda v: v - sum(i < v for i in gone))
    if key in fields.LAST:
        return _change_each(value, lambda v: v - sum(i <= v for i in gone))
    if key in fields.SUFFIX:
        return value - sum(i >= count - value for i in gone)
    if key in fields.DEPTH_POWERS:
        return value * (count / len(kept)) ** fields.DEPTH_POWERS[key]
    if key in fields.CYCLE:
        return [value[i % len(value)] for i in kept]
    if key in fields.PERIODS and value < 1:
        raise ValueError("a period below 1")
    return value


def _drop_generators(part: dict[str, Any]) -> None:
    for key, replacement in fields.GENERATORS.items():
        if part.get(key) is None or part.get(replacement) is not None:
            part.pop(key, None)
        # With 0 or 1, every block is the same.
        elif not isinstance(part[key], int) or part[key] not in (0, 1):
            raise ArchitectureError(
                f"{key}={part[key]!r} repeats with the block number and {replacement} is not "
                f"given; write {replacement} out in the configuration"
            )


def _slice_field(key: str, value: Any, mapping: dict[int, int], count: int) -> Any:
    if isinstance(value, (int, float)):
        return value  # e.g. moe_layer_freq = 1: every block is the same
    if len(value) < count:
        raise ArchitectureError(
            f"{key} has {len(value)} entries for {count} blocks; expected one per block"
        )
    kept = [value[i] for i in mapping if i < len(value)]
    return "".join(kept) if isinstance(value, str) else kept


def _renumber_list(value: Any, mapping: dict[int, int], *, first: int) -> Any:
    """Renumber a list, or comma-separated text, of block numbers that start at ``first``."""
    if isinstance(value, str):
        numbers = [int(word) for word in value.split(",") if word.strip()]
        return ",".join(map(str, _renumber_list(numbers, mapping, first=first)))
    return [mapping[i - first] + first for i in value if i - first in mapping]


def _change_each(value: Any, change: Callable[[int], int]) -> Any:
    """Change a number, or each number of a list (one for each modality)."""
    return [change(v) for v in value] if isinstance(value, list) else change(value)


# Kinds of mixer that write keys and values.
_CACHED = {"attention", "sliding-attention", "chunked-attention"}
_LIST_NAMES = r"(?:layers|layer|h|blocks|block|blk)"
# "model.layers.3.mlp", "re:.*layers\\.(3|4)\\.mlp", "layers.1*", "re:.*(layers|blocks)\\.3": what
# stands between the list's name and the number, and the number.
_NUMBERED = re.compile(
    rf"(?<!\w)(?:{_LIST_NAMES}|\((?:\?:)?{_LIST_NAMES}(?:\|{_LIST_NAMES})*\))"
    r"((?:(?:\|[^()]{0,200})?\))*\\?\.\)?)"
    r"(\d+(?=$|[.\\*])|\\d\+|[0-9*?\[\]\-]+\+?|\([^)]*[|\[][^)]*\))"
)
_ANY_NUMBER = {"*", r"\d+", "[0-9]+", "([0-9]+)"}
OTHER_STACKS = ("vision", "visual", "audio", "tower", "encoder")
"""Words in the names of modules of encoders and other modalities."""


def cut_config(
    config: dict[str, Any], removed: Sequence[int], *, drop_mtp: bool = False
) -> dict[str, Any]:
    """Return the configuration of the model without the removed blocks.

    Args:
        config: a checkpoint's ``config.json`` (or ``PreTrainedConfig.to_dict()``); not changed.
        removed: block numbers, in any order.
        drop_mtp: also remove the layers for multi-token prediction.

    Raises:
        ArchitectureError: a number out of range, an illegal state, a block that computes with
            its own number, or a per-layer field that is not in the tables.
    """
    result, text, count = _open_config(config)
    mapping = renumber_blocks(count, removed)
    families.write_out(text, count)
    types = _read_types(config)
    state = np.array([[i not in mapping for i in range(count)]])
    attention = [i for i, kind in enumerate(types) if families.fills_cache(kind)]
    for row in families.legality(result, text, count, attention):
        if not row.satisfied(state)[0]:
            raise ArchitectureError(
                f"blocks {', '.join(map(str, removed))} cannot be removed: {row.describe()}"
            )
    families.move_images(result, mapping)
    numbers = renumber_blocks(count, removed, 0 if drop_mtp else mtp_layers(text))
    for part, _ in find_parts(result, text):
        cut_fields(part, count, numbers)
        if drop_mtp:
            part.update({key: 0 for key in fields.MTP if part.get(key)})
    if text.get("attention_types") and isinstance(text.get("attention_layers"), list):
        text["attention_types"] = [[[kind], 1] for kind in text["attention_layers"]]
    for part in (result, text) if text is not result else (result,):
        quantisation = part.get("quantization_config")
        if isinstance(quantisation, dict):
            part["quantization_config"] = cut_quantisation(quantisation, numbers)
    return result


def legality(config: dict[str, Any], stack: BlockStack) -> list[LinearConstraint]:
    """Return the linear constraints that every state of a model must satisfy, for the solver.

    Args:
        config: the model's configuration.
        stack: the model's blocks, as from `find_stack`.

    Raises:
        ArchitectureError: the configuration cannot be cut in any state.
    """
    whole, text, count = _open_config(config)
    layers = stack.layers
    cached = [i for i, k in enumerate(stack.kinds) if _CACHED & set(k.split("+"))]
    attention = sorted({layers[i] for i in cached})
    rows = families.legality(whole, text, count, attention)
    if len(stack) == count:
        return rows
    # A layer that keeps a block stays, so only whole layers can be illegal.
    size = np.bincount(layers)
    inside = np.array(layers) == np.arange(count)[:, None]
    lifted = list[LinearConstraint]()
    for row in rows:
        if row.name == "keep attention":
            some = np.isin(range(len(stack)), cached).astype(float)
            lifted.append(dataclasses.replace(row, coefficients=some))
            continue
        if row.name.startswith("keep"):
            # Later layers may read what the mixer of a layer has computed.
            mixers = np.zeros(len(stack))
            mixers[np.searchsorted(layers, range(count))] = row.coefficients
            lifted.append(dataclasses.replace(row, coefficients=mixers))
        for layer in np.flatnonzero(row.coefficients):
            name = f"{row.name} (layer {layer})"
            lifted.append(
                LinearConstraint(name, inside[layer], "<=", size[layer] - 1, row.reason)
            )
    return lifted


def cut_quantisation(value: Any, mapping: dict[int, int]) -> Any:
    """Renumber every module name in a quantisation configuration, recursively."""

    def rename(item: Any) -> list[Any]:
        if isinstance(item, str):
            return rename_pattern(item, mapping)
        return [cut_quantisation(item, mapping)]

    if isinstance(value, dict):
        cut = ((key, cut_quantisation(item, mapping)) for key, item in value.items())
        return {name: item for key, item in cut for name in rename(key)}
    if isinstance(value, list):
        names = [name for item in value for name in rename(item)]
        plain = all(isinstance(name, str) for name in names)
        return list(dict.fromkeys(names)) if plain else names
    return value


def renumber_blocks(
    count: int, removed: Sequence[int], layers: int = 0
) -> dict[int, int]:
    """Return the new number of each block that stays, by its old number.

    Args:
        count: number of blocks before the cut.
        removed: block numbers, in any order.
        layers: number of MTP layers to include; in some checkpoints their numbers follow those of
            the blocks.

    Raises:
        ArchitectureError: a removed block does not exist, or none would stay.
    """
    chosen = set(removed)
    outside = sorted(i for i in chosen if not 0 <= i < count)
    if outside:
        raise ArchitectureError(
            f"blocks to remove must be 0 to {count - 1}; got {', '.join(map(str, outside))}"
        )
    if len(chosen) == count:
        raise ArchitectureError(
            f"all {count} blocks would be removed; keep at least one"
        )
    kept = (i for i in range(count + layers) if i not in chosen)
    return {old: new for new, old in enumerate(kept)}


def rename_pattern(entry: str, mapping: dict[int, int]) -> list[str]:
    """Return the entries that replace one module name or pattern of a quantisation list.

    Args:
        entry: a module name, a glob, or a regular expression marked ``re:``.
        mapping: new numbers, as from `renumber_blocks`; others are dropped.

    Returns:
        the entry itself if it names no block; an empty list if it names only removed blocks.

    Raises:
        ArchitectureError: a number pattern that cannot be renumbered exactly.
    """
    match = _NUMBERED.search(entry)
    if match is None or any(
        word in entry[: match.start()] for word in (*OTHER_STACKS, "mtp")
    ):
        return [entry]
    number = match.group(2)
    head = entry[: match.start(2)]
    others = _NUMBERED.finditer(entry, match.end()) if entry.startswith("re:") else ()
    numbers = [number, *(other.group(2) for other in others)]
    rest = entry[match.end(2) :]
    if number.isdigit() and len(numbers) == 1 and ")" not in match.group(1):
        regular = entry.startswith("re:")
        # After the digits, "*" in a glob and ".*" or the end in an expression match 10 to 19 too.
        if regular and re.match(r"$|\.[*+?{]", rest):
            number = f"{number}*"
            rest = rf"(?!\d){rest}"
        elif rest.startswith("*") and not regular:
            number = f"{number}*"
            rest = rest[1:] or ".*"
    elif _ANY_NUMBER.issuperset(numbers):
        return [entry]
    elif entry.startswith("re:") or not re.fullmatch(r"[0-9*?\[\]\-]+", number):
        raise ArchitectureError(
            f"quantisation entry {entry!r} names blocks by a pattern that cannot be renumbered "
            "exactly; write one entry per block"
        )
    else:
        rest = rest or ".*"
    return [
        f"{head}{mapping[int(i)]}{rest}"
        for i in fnmatch.filter(map(str, mapping), number)
    ]


def refuse_packing(config: Mapping[str, Any]) -> None:
    """Raise for weights that cannot be measured or verified without the library that packed them.

    Raises:
        ArchitectureError: bitsandbytes packed the weights; the message has a solution.
    """
    quantisation = config.get("quantization_config")
    if (
        isinstance(quantisation, dict)
        and quantisation.get("quant_method") == "bitsandbytes"
    ):
        raise ArchitectureError(
            "the weights are packed by bitsandbytes; cut the checkpoint it was made from and "
            "quantise the result"
        )


def depth(text: Mapping[str, Any]) -> int:
    """Return the number of blocks in a decoder's configuration dictionary.

    Raises:
        ArchitectureError: the configuration has no valid number of blocks.
    """
    model_type = text.get("model_type", "")
    for key in ("layers_block_type", "hybrid_override_pattern"):
        if model_type == "nemotron_h" and isinstance(text.get(key), (list, str)):
            return len(text[key])
    for key in counted_by(model_type):
        value: Any = text.get(key)
        if type(value) is int:
            if value < 1:
                raise ArchitectureError(
                    f"the configuration says {key}={value}; expected at least 1"
                )
            return value
    raise ArchitectureError(
        explain_uncuttable(text)
        or "the configuration does not say how many blocks the model has: expected one of "
        + ", ".join(fields.COUNT)
    )


def read_decoder(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the decoder's part of a configuration, per-layer fields written out."""
    return materialise(copy.deepcopy(config))


def materialise(config: dict[str, Any]) -> dict[str, Any]:
    """Write out, in place, the per-layer fields that the config class would derive.

    Returns:
        the decoder's part of ``config``, as from `text_part`.
    """
    text = text_part(config)
    full = decoder_object(config)
    if full is None:
        return text
    values = full.to_dict()
    kinds = ("layer_types", "layers_block_type", "hybrid_override_pattern")
    has_types = any(text.get(key) is not None for key in kinds)
    aliases = dict(getattr(full, "attribute_map", {}))
    for key in fields.WRITTEN_OUT:
        value = values.get(key)
        names = (key, *(alias for alias, real in aliases.items() if real == key))
        if value is None or any(text.get(name) is not None for name in names):
            continue
        if key in kinds[:2] and has_types:
            continue
        text[key] = copy.deepcopy(value)
    text.setdefault("model_type", values.get("model_type", ""))
    return text


def _read_types(config: dict[str, Any]) -> Sequence[str]:
    """Return the types of the blocks that transformers reads from a configuration, if known."""
    types = getattr(decoder_object(config), "layer_types", None)
    return types if isinstance(types, (list, tuple)) else ()


def _open_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return a copy of a configuration, the decoder's part of it with its per-layer fields written
    out, and its number of blocks.

    Raises:
        ArchitectureError: it cannot be cut exactly, or has an unknown per-layer field.
    """
    refuse_packing(config)
    whole = copy.deepcopy(config)
    text = materialise(whole)
    if reason := explain_uncuttable(text):
        raise ArchitectureError(reason)
    count = depth(text)
    layers = mtp_layers(text)
    for part, decoder in find_parts(whole, text):
        # A cut without removed blocks checks that each field has a known form.
        cut_fields(dict(part), count, {i: i for i in range(count)})
        refuse_unknown(part, count, layers, decoder=decoder)
    decoder_config = decoder_object(whole)
    if decoder_config is not None:
        values = decoder_config.to_dict()
        more = {key: value for key, value in values.items() if key not in text}
        refuse_unknown(more, count, layers, decoder=True)
    return whole, text, count


def explain_uncuttable(text: Mapping[str, Any]) -> str:
    """Return the reason why a model of this type cannot be cut; empty if it can."""
    what = str(text.get("model_type", ""))
    reason = of_type(UNCUTTABLE, what)
    if text.get("scale_attn_by_inverse_layer_idx"):
        what = "this model"
        reason = "its attention is scaled by 1 / (block number + 1)"
    return f"{what} cannot be cut exactly: {reason}" if reason else ""


def mtp_layers(text: Mapping[str, Any]) -> int:
    """Count the layers for multi-token prediction (MTP), which draft further tokens."""
    counts = [text.get(key) for key in fields.MTP]
    return max((n for n in counts if isinstance(n, int)), default=0)
