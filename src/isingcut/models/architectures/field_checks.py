"""Whether the per-layer fields of a configuration have the form that the table says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import fields

_KNOWN = {
    *fields.WRITTEN_OUT,
    *fields.MAPS,
    *fields.SLICE_OR_SCALAR,
    *fields.GENERATORS,
    *fields.NOT_PER_LAYER,
}
_LAYERISH = re.compile(r"layer|block|_idx|_ids|indices|idxs")
_PERIODISH = re.compile(
    r"layer.*(period|offset|interval|freq|step|every|_index)|(period|interval|every).*layer"
)

_WORDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_PERIODS = ("attn_layer_period", "expert_layer_period")
_OFFSETS = ("attn_layer_offset", "expert_layer_offset", "decoder_sparse_step")


def check_fields(text: Mapping[str, Any], count: int) -> None:
    """Refuse a per-layer field of another form than the table says, or that it lacks.

    Model classes check the fields that they know; others stand in a configuration unread.

    Args:
        text: the decoder's configuration, per-layer fields written out.
        count: its number of blocks.

    Raises:
        ArchitectureError: a list is none, an index is no number, a map has other keys; or a
            field that is not in the table looks per-layer.
    """
    forms: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_WORDS, _is_words, "a list of words"),
        (
            fields.SLICE,
            lambda v: isinstance(v, (list, str, int, float)),
            "a list with an entry per block",
        ),
        (
            fields.INDICES,
            lambda v: isinstance(v, list) and all(map(_is_whole, v)),
            "a list of numbers",
        ),
        (fields.MAPS, _is_numbered, "a map by block number"),
        (
            (*fields.PREFIX, *fields.LAST, *fields.SUFFIX, *fields.MTP, *_OFFSETS),
            _is_whole,
            "a whole number",
        ),
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
    _refuse_unknown(text, count)


def _refuse_unknown(text: Mapping[str, Any], count: int) -> None:
    for key, value in text.items():
        if key in _KNOWN or key.startswith("_"):
            continue
        suspicious = False
        if isinstance(value, list):
            numbers = all(isinstance(i, int) and 0 <= i < count for i in value) and value
            suspicious = len(value) == count or bool(numbers and _LAYERISH.search(key))
        elif isinstance(value, dict):
            suspicious = (
                bool(value) and bool(_LAYERISH.search(key)) and all(str(k).isdigit() for k in value)
            )
        elif isinstance(value, int) and not isinstance(value, bool):
            suspicious = value > 1 and bool(_PERIODISH.search(key))
        if suspicious:
            raise ArchitectureError(
                f"the configuration field {key!r} looks per-layer (value {value!r:.60}) and "
                "isingcut does not know what it means; add it to architectures/fields.py"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)
