"""The table in `fields`, applied: every per-layer field of a configuration, checked and cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import fields
from isingcut.models.architectures.fields import COUNTED_BY, PER_MODALITY, of_type

_KNOWN = {
    *fields.WRITTEN_OUT,
    *fields.MAPS,
    *fields.SLICE_OR_SCALAR,
    *fields.GENERATORS,
    *fields.DEEPSTACK,
    *fields.IMAGE_ENTRIES,
    *fields.NOT_PER_LAYER,
}
# Names of what may count or index blocks; layer norms, layer drop and layer scales do not.
_BLOCKS = r"(^|_)(layers?|blocks?|depth)(_(?!norm|drop|scale)|$)"
_COUNTS = re.compile(_BLOCKS)
_LAYERISH = re.compile(rf"{_BLOCKS}|_idx|_ids$|indices|idxs|indexes|deepstack")
_PERIODISH = re.compile(
    r"layer.*(period|offset|interval|freq|step|every|_index)|(period|interval|every).*layer"
)
_PATTERNISH = re.compile(r"pattern|types|layers|blocks")
# Words in names, outside the decoder's part, of what counts something else.
_ELSEWHERE = re.compile(
    r"vision|visual(?!_index)|image|video|audio|speech|vit|tower|encoder|projector|connector|"
    r"resampler|adapter|former|merger|mtp|nextn|perceiver"
)

_WORDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_PERIODS = ("attn_layer_period", "expert_layer_period")
_OFFSETS = ("attn_layer_offset", "expert_layer_offset", "decoder_sparse_step")
# A part of a configuration that has one of these is another model, and counts blocks of its own.
_OWN = {*fields.COUNT, "depth", "depths", "num_layer", "encoder_layers", "model_type"}
# Their own code renumbers what these hold, or it is about something else.
_CLOSED = {"quantization_config", *fields.MAPS, *fields.NOT_PER_LAYER}


def check_fields(text: Mapping[str, Any]) -> None:
    """Refuse a per-layer field of another form than the table says.

    Model classes check the fields that they know; others stand in a configuration unread.

    Args:
        text: a part of a configuration that speaks of the decoder's blocks.

    Raises:
        ArchitectureError: a list is none, an index is no number, or a map has other keys.
    """
    forms: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_WORDS, _is_words, "a list of words"),
        (fields.SLICE, _is_listed, "a list with an entry per block"),
        ((*fields.INDICES, *fields.INDICES_FROM_1), _are_indices, "a list of numbers"),
        (fields.SOURCES, _are_whole, "a list with a block number per block"),
        (fields.MAPS, _is_numbered, "a map by block number"),
        ((*fields.PREFIX, *fields.LAST), _is_whole_or_each, "a whole number"),
        ((*fields.SUFFIX, *fields.MTP, *_OFFSETS), _is_whole, "a whole number"),
        (tuple(fields.DEPTH_POWERS), _is_number, "a number"),
        (_PERIODS, lambda v: _is_whole(v) and v > 0, "a whole number above 0"),
        (fields.CYCLE, lambda v: isinstance(v, list) and bool(v), "a list with an entry or more"),
    ]
    for names, fits, wanted in forms:
        for name in names:
            if text.get(name) is not None and not fits(text[name]):
                raise ArchitectureError(
                    f"the configuration field {name!r} must be {wanted}; got {text[name]!r:.60}"
                )
    shared = "num_kv_shared_layers"
    if text.get(shared) and not isinstance(text.get("layer_types"), list):
        raise ArchitectureError(
            f"the configuration has {shared}={text[shared]} and no list 'layer_types', which says "
            "whose keys and values are shared; write it out"
        )


def refuse_unknown(part: Mapping[Any, Any], count: int, heads: int, *, decoder: bool) -> None:
    """Refuse a field that is not in the table and looks as if it counted or indexed blocks.

    Args:
        part: a part of a configuration that speaks of the decoder's blocks.
        count: blocks of the decoder.
        heads: its heads for further tokens, which some lists have entries for as well.
        decoder: it is the decoder's own part, or inside it; elsewhere only names tell.

    Raises:
        ArchitectureError: there is one; the message names it.
    """
    for key, value in part.items():
        if not isinstance(key, str):
            continue  # a table of numbers, which a configuration object may hold
        if key in _KNOWN or key.startswith("_") or "token_id" in key:
            continue
        if not decoder and _ELSEWHERE.search(key):
            continue
        if _speaks_of_blocks(key, value, count, {count, count + heads} if decoder else set()):
            raise ArchitectureError(
                f"the configuration field {key!r} looks per-layer (value {value!r:.60}) and "
                "isingcut does not know what it means; add it to architectures/fields.py"
            )


def _speaks_of_blocks(key: str, value: Any, count: int, lengths: set[int]) -> bool:
    if isinstance(value, (list, tuple)):
        flat = [v for item in value for v in (item if isinstance(item, (list, tuple)) else [item])]
        numbers = bool(flat) and all(_is_whole(i) and -count <= i <= count for i in flat)
        return len(value) in lengths or (numbers and bool(_LAYERISH.search(key)))
    if isinstance(value, dict):
        return bool(value) and bool(_LAYERISH.search(key)) and all(str(k).isdigit() for k in value)
    if isinstance(value, str):
        listed = bool(re.fullmatch(r"\d+(,\d+)+", value)) and bool(_LAYERISH.search(key))
        return listed or (len(value) in lengths and bool(_PATTERNISH.search(key)))
    if _is_whole(value):
        return (value > 1 and bool(_PERIODISH.search(key))) or (
            value > 0 and bool(_COUNTS.search(key))
        )
    return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_indices(value: Any) -> bool:
    return _are_whole(value) or (
        isinstance(value, str)
        and all(word.strip().isdecimal() for word in value.split(",") if word)
    )


def _is_whole_or_each(value: Any) -> bool:
    return _is_whole(value) or _are_whole(value)


def _is_listed(value: Any) -> bool:
    return isinstance(value, (list, str, int, float))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)


def speaking_parts(
    config: dict[str, Any], text: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The decoder's part of a configuration, the root, and what lies in these and is no model
    of its own: where fields speak of the decoder's blocks; each with whether it is the decoder's.

    Args:
        config: the whole configuration.
        text: the decoder's part of it.
    """
    for part in (text, *_within(text, text)):
        yield part, True
    if config is not text:
        for part in (config, *_within(config, text)):
            yield part, False


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
        part: as from `speaking_parts`, its fields in the forms that `check_fields` asks for.
        count: blocks before the cut.
        mapping: old block number to new, for those that stay.

    Raises:
        ArchitectureError: a list is too short, or a period cannot be said of the kept blocks.
    """
    kept = list(mapping)
    gone = [i for i in range(count) if i not in mapping]
    model_type = part.get("model_type", "")
    _, often = of_type(COUNTED_BY, model_type) or ("", 1)
    per_modality = of_type(PER_MODALITY, model_type) or ()
    for key in list(part):
        value = part[key]
        if value is None or key in per_modality:
            continue
        if key in fields.COUNT and value == count:
            part[key] = len(kept)
        elif key in fields.COUNT and value == count * often:
            part[key] = len(kept) * often
        elif key in fields.SLICE or (key in fields.SLICE_OR_SCALAR and isinstance(value, list)):
            part[key] = _sliced(key, value, kept, count)
        elif key in fields.INDICES:
            part[key] = _renumbered(value, mapping, first=0)
        elif key in fields.INDICES_FROM_1:
            part[key] = _renumbered(value, mapping, first=1)
        elif key in fields.SOURCES:
            part[key] = [mapping[i] for i in _sliced(key, value, kept, count)]
        elif key in fields.MAPS:
            part[key] = {str(mapping[int(k)]): v for k, v in value.items() if int(k) in mapping}
        elif key in fields.PREFIX:
            part[key] = _each(value, lambda v: v - sum(i < v for i in gone))
        elif key in fields.LAST:
            part[key] = _each(value, lambda v: v - sum(i <= v for i in gone))
        elif key in fields.SUFFIX:
            part[key] = value - sum(i >= count - value for i in gone)
        elif key in fields.DEPTH_POWERS:
            part[key] = value * (count / len(kept)) ** fields.DEPTH_POWERS[key]
        elif key in fields.CYCLE:
            part[key] = [value[i % len(value)] for i in kept]
        elif key in fields.MTP:
            part[key] = 0
    _drop_generators(part)


def _drop_generators(part: dict[str, Any]) -> None:
    for key, replacement in fields.GENERATORS.items():
        if part.get(key) is None:
            part.pop(key, None)
        elif part.get(replacement) is not None:
            del part[key]
        elif isinstance(part[key], int) and part[key] in (0, 1):
            continue  # every block the same
        else:
            raise ArchitectureError(
                f"{key}={part[key]!r} repeats with the block number and {replacement} is not "
                f"given; write {replacement} out in the configuration"
            )


def _sliced(key: str, value: Any, kept: list[int], count: int) -> Any:
    if isinstance(value, (int, float, bool)):
        return value  # e.g. moe_layer_freq = 1: every block the same
    if len(value) < count:
        raise ArchitectureError(
            f"{key} has {len(value)} entries for {count} blocks; expected one per block"
        )
    return "".join(value[i] for i in kept) if isinstance(value, str) else [value[i] for i in kept]


def _renumbered(value: Any, mapping: dict[int, int], *, first: int) -> Any:
    """A list of block numbers, or a text of them, after the cut; what it counts from is kept."""
    if isinstance(value, str):
        numbers = [int(word) for word in value.split(",") if word.strip()]
        return ",".join(map(str, _renumbered(numbers, mapping, first=first)))
    return [mapping[i - first] + first for i in value if i - first in mapping]


def _each(value: Any, change: Callable[[int], int]) -> Any:
    """A number changed, or each of a list (a modality each)."""
    return [change(v) for v in value] if isinstance(value, list) else change(value)
