"""Cut a configuration by the table in `fields`: the JSON dictionary of any checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures import families, fields
from isingcut.models.architectures.base import BlockStack
from isingcut.models.architectures.names import rename_pattern, renumbering
from isingcut.models.loading import one_line, quiet_transformers

_LAYERISH = re.compile(r"layer|block|_idx|_ids|indices|idxs")
_PERIODISH = re.compile(
    r"layer.*(period|offset|interval|freq|step|every|_index)|(period|interval|every).*layer"
)


def cut_config(config: dict[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """The configuration of the model without the removed blocks.

    Args:
        config: a checkpoint's ``config.json`` (or ``PreTrainedConfig.to_dict()``); not changed.
        removed: block numbers, in any order.

    Raises:
        ArchitectureError: a number out of range, an illegal state, a block that computes with
            its own number, or a per-layer field that is not in the table.
    """
    result = copy.deepcopy(config)
    text = materialise(result)
    count = depth(text)
    mapping = renumbering(count, removed)
    _refuse_depth_dependent(text)
    fields.check(text)
    families.write_out(text, count)
    must_stay = families.kept_blocks(text, count)
    for old in set(must_stay) - set(mapping):
        raise ArchitectureError(f"block {old} cannot be removed: {must_stay[old]}")
    types = _types(config)
    _cut_fields(text, count, mapping)
    families.follow(text, count, mapping)
    kept_types = [types[i] for i in mapping] if types else []
    families.check_last(text, kept_types)
    if _types(result) != kept_types:
        raise ArchitectureError(
            f"transformers would read the kept blocks as {_short(_types(result))}, but they are "
            f"{_short(kept_types)}"
        )
    if families.keeps_attention(types) and not families.keeps_attention(kept_types):
        raise ArchitectureError(
            "every attention block would be removed; keep at least one, because generation reads "
            "the sequence length from an attention cache"
        )
    for part in (result, text) if text is not result else (result,):
        quantisation = part.get("quantization_config")
        if isinstance(quantisation, dict):
            part["quantization_config"] = cut_quantisation(quantisation, mapping, count)
    return result


def legality(config: Any, stack: BlockStack) -> list[LinearConstraint]:
    """The linear rows that every state of a model has to obey, for the solver.

    Args:
        config: the model's configuration, an object or its dictionary.
        stack: the model's blocks, as from `find_stack`.

    Raises:
        ArchitectureError: the configuration cannot be cut at all, whichever the state.
    """
    values = copy.deepcopy(config) if isinstance(config, dict) else config.to_dict()
    text = materialise(values)
    _refuse_depth_dependent(text)
    fields.check(text)
    _refuse_unknown(text, len(stack))
    return families.legality(text, stack)


def cut_quantisation(value: Any, mapping: dict[int, int], count: int) -> Any:
    """A quantisation configuration with every module name renumbered, recursively."""
    if isinstance(value, dict):
        out = {}
        for key, item in value.items():
            for name in rename_pattern(key, mapping, count) if isinstance(key, str) else [key]:
                out[name] = cut_quantisation(item, mapping, count)
        return out
    if isinstance(value, list):
        cut: list[Any] = []
        for item in value:
            if isinstance(item, str):
                cut.extend(rename_pattern(item, mapping, count))
            else:
                cut.append(cut_quantisation(item, mapping, count))
        return list(dict.fromkeys(cut)) if all(isinstance(i, str) for i in cut) else cut
    return value


def depth(text: dict[str, Any]) -> int:
    """Number of blocks in a decoder's configuration dictionary.

    Raises:
        ArchitectureError: it does not say.
    """
    for key in ("layers_block_type", "hybrid_override_pattern"):
        if text.get("model_type") == "nemotron_h" and isinstance(text.get(key), (list, str)):
            return len(text[key])
    for key in fields.COUNT:
        value = text.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ArchitectureError(
                    f"the configuration says {key}={value}; expected at least 1"
                )
            return value
    raise ArchitectureError(
        f"the configuration does not say how many blocks the model has: expected one of "
        f"{', '.join(fields.COUNT)}"
    )


def materialise(config: dict[str, Any]) -> dict[str, Any]:
    """Write out, in place, the per-layer fields that the config class would derive.

    Returns:
        the decoder's part of ``config`` (``config`` itself unless it is composite).
    """
    derived = _class_config(config)
    if derived is None:
        for key in ("text_config", "llm_config", "language_config"):
            if isinstance(config.get(key), dict):
                return config[key]  # type: ignore[no-any-return]
        return config
    full = derived.get_text_config(decoder=True)
    text = config
    for key in _path_of(derived, full):
        text = text.setdefault(key, {})
    values = full.to_dict()
    has_types = any(
        text.get(k) is not None
        for k in ("layer_types", "layers_block_type", "hybrid_override_pattern")
    )
    aliases = dict(getattr(full, "attribute_map", {}))
    for key in _TABLE_FIELDS:
        value = values.get(key)
        if value is None or text.get(key) is not None:
            continue
        if any(text.get(alias) is not None for alias, real in aliases.items() if real == key):
            continue
        if key in ("layer_types", "layers_block_type") and has_types:
            continue
        text[key] = copy.deepcopy(value)
    if "model_type" not in text:
        text["model_type"] = values.get("model_type", "")
    return text


_TABLE_FIELDS = (
    *fields.COUNT,
    *fields.SLICE,
    *fields.INDICES,
    *fields.PREFIX,
    *fields.LAST,
    *fields.SUFFIX,
    *fields.CYCLE,
    *fields.MTP,
    *families.FIELDS,
)


def with_depth(config: dict[str, Any], count: int) -> Any | None:
    """The configuration object of the same model with ``count`` blocks; None if it cannot be.

    Args:
        config: a checkpoint's ``config.json``; not changed.
    """
    changed = copy.deepcopy(config)
    try:
        derived = _class_config(changed)
        if derived is None:
            return None
        text = changed
        for key in _path_of(derived, derived.get_text_config(decoder=True)):
            text = text.setdefault(key, {})
        named = [key for key in fields.COUNT if isinstance(text.get(key), int)]
        text.update(dict.fromkeys(named or fields.COUNT[:1], count))
        return _class_config(changed)
    except ArchitectureError:
        return None


def _class_config(config: dict[str, Any]) -> Any | None:
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[model_type].from_dict(_decoded(plain))
    except Exception as error:
        raise ArchitectureError(
            f"the configuration is not a valid {model_type} configuration: {one_line(error)}"
        ) from error


def _types(config: dict[str, Any]) -> list[str]:
    """What transformers calls each block of a configuration; empty where it does not say."""
    derived = _class_config(config)
    text = None if derived is None else derived.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    return list(types) if isinstance(types, (list, tuple)) else []


def _decoded(value: Any) -> Any:
    """A copy with the tags resolved that transformers writes for infinite numbers."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: _decoded(v) for k, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def _path_of(config: Any, wanted: Any) -> tuple[str, ...]:
    if config is wanted:
        return ()
    for key, value in vars(config).items():
        if value is wanted:
            return (key,)
        if hasattr(value, "get_text_config"):
            deeper = _path_of(value, wanted)
            if deeper:
                return (key, *deeper)
    return ()


def _refuse_depth_dependent(text: dict[str, Any]) -> None:
    for key, harmless, reason in fields.DEPTH_DEPENDENT_FIELDS:
        if text.get(key, harmless) != harmless:
            raise ArchitectureError(f"{key}={text[key]!r}: {reason}; it cannot be cut exactly")
    model_type = text.get("model_type", "")
    for name, reason in fields.DEPTH_DEPENDENT_TYPES.items():
        if model_type in (name, f"{name}_text"):
            raise ArchitectureError(f"{model_type} cannot be cut exactly: {reason}")


def _cut_fields(text: dict[str, Any], count: int, mapping: dict[int, int]) -> None:
    kept = list(mapping)
    gone = [i for i in range(count) if i not in mapping]
    _refuse_unknown(text, count)
    for key in list(text):
        value = text[key]
        if value is None:
            continue
        if key in fields.COUNT and value == count:
            text[key] = len(kept)
        elif key in fields.SLICE or (key in fields.SLICE_OR_SCALAR and isinstance(value, list)):
            text[key] = _sliced(key, value, kept, count)
        elif key in fields.INDICES:
            text[key] = [mapping[i] for i in value if i in mapping]
        elif key in fields.MAPS:
            text[key] = {str(mapping[int(k)]): v for k, v in value.items() if int(k) in mapping}
        elif key in fields.PREFIX:
            text[key] = value - sum(i < value for i in gone)
        elif key in fields.LAST:
            text[key] = value - sum(i <= value for i in gone)
        elif key in fields.SUFFIX:
            text[key] = value - sum(i >= count - value for i in gone)
        elif key in fields.CYCLE:
            text[key] = [value[i % len(value)] for i in kept]
        elif key in fields.MTP:
            text[key] = 0
    for key, replacement in fields.GENERATORS.items():
        if text.get(key) is None:
            text.pop(key, None)
        elif text.get(replacement) is not None:
            del text[key]
        elif isinstance(text[key], int) and text[key] in (0, 1):
            continue  # every block the same
        else:
            raise ArchitectureError(
                f"{key}={text[key]!r} repeats with the block number and {replacement} is not "
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


def _known_fields() -> Iterator[str]:
    yield from _TABLE_FIELDS
    yield from fields.MAPS
    yield from fields.SLICE_OR_SCALAR
    yield from fields.GENERATORS
    yield from fields.NOT_PER_LAYER


def _refuse_unknown(text: dict[str, Any], count: int) -> None:
    known = set(_known_fields())
    for key, value in text.items():
        if key in known or key.startswith("_"):
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
                f"the configuration field {key!r} looks per-layer (value {_short(value)}) and "
                "isingcut does not know what it means; add it to architectures/fields.py"
            )


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else words[:57] + "..."
