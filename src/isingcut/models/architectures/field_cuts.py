"""The table in `fields`, applied: every per-layer field of a configuration for the kept blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import fields
from isingcut.models.architectures.model_types import COUNTED_BY, PER_MODALITY, of_type

# A part of a configuration that has one of these is another model, and counts blocks of its own.
_OWN = {*fields.COUNT, "depth", "depths", "num_layer", "encoder_layers", "model_type"}
# Their own code renumbers what these hold, or it is about something else.
_CLOSED = {"quantization_config", *fields.MAPS, *fields.NOT_PER_LAYER}


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
        part: as from `speaking_parts`, its fields in the forms that `field_checks` asks for.
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
