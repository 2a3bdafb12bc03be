"""Cut a configuration, the JSON dictionary of any checkpoint: its fields and names of modules."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures import families, fields
from isingcut.models.architectures.base import BlockStack
from isingcut.models.architectures.field_cuts import (
    check_fields,
    cut_fields,
    refuse_unknown,
    speaking_parts,
)
from isingcut.models.architectures.fields import TWO_STAY, UNCUTTABLE, counted_by, of_type
from isingcut.models.architectures.text_part import config_object, count_of, text_part

_LIST_NAMES = r"(?:layers|layer|h|blocks|block|blk)"
# "model.layers.3.mlp", "re:.*layers\\.3\\.mlp", "layers.1*": the number after the list's name.
_NUMBERED = re.compile(
    rf"(?:^|(?<=[.*:]))({_LIST_NAMES})(\\?\.)(\d+(?=$|[.\\*])|\\d\+|[0-9*?\[\]\-]+\+?)"
)
OTHER_STACKS = ("vision", "visual", "audio", "tower", "encoder")
"""Words in the names of modules that are of another modality."""


def cut_config(config: dict[str, Any], removed: Sequence[int]) -> dict[str, Any]:
    """The configuration of the model without the removed blocks.

    Args:
        config: a checkpoint's ``config.json`` (or ``PreTrainedConfig.to_dict()``); not changed.
        removed: block numbers, in any order.

    Raises:
        ArchitectureError: a number out of range, an illegal state, a block that computes with
            its own number, or a per-layer field that is not in the table.
    """
    refuse_packing(config)
    result = copy.deepcopy(config)
    text = materialise(result)
    count = depth(text)
    mapping = renumbering(count, removed)
    _refuse_unclear(result, text, count)
    families.write_out(text, count)
    must_stay = families.kept_blocks(result, text, count)
    for old in sorted(set(must_stay) - set(mapping)):
        raise ArchitectureError(f"block {old} cannot be removed: {must_stay[old]}")
    if len(mapping) == 1 and (reason := of_type(TWO_STAY, text.get("model_type"))):
        raise ArchitectureError(f"block {next(iter(mapping))} cannot stay alone: {reason}")
    for block, source, reason in families.sources(text, count):
        if block in mapping and source not in mapping:
            raise ArchitectureError(
                f"block {source} cannot be removed while block {block} stays: {reason}"
            )
    families.move_images(result, count, mapping)
    read, types = _as_read(config)
    for part, _ in speaking_parts(result, text):
        cut_fields(part, count, mapping)
    families.follow(text, count, mapping)
    kept_types = [types[i] for i in mapping] if types else []
    families.check_last(text, kept_types)
    new_read, new_types = _as_read(result)
    if new_types != kept_types:
        raise ArchitectureError(
            f"transformers would read the kept blocks as {_short(new_types)}, but they are "
            f"{_short(kept_types)}"
        )
    if read == count and new_read != len(mapping):
        raise ArchitectureError(
            f"transformers would read {new_read} blocks from the cut configuration, and "
            f"{len(mapping)} stay"
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
    whole = copy.deepcopy(config) if isinstance(config, dict) else config.to_dict()
    text = materialise(whole)
    refuse_packing(whole)
    _refuse_unclear(whole, text, len(stack))
    return families.legality(whole, text, stack)


def cut_quantisation(value: Any, mapping: dict[int, int], count: int) -> Any:
    """A quantisation configuration with every module name renumbered, recursively."""

    def renamed(item: Any) -> list[Any]:
        if isinstance(item, str):
            return list(rename_pattern(item, mapping, count))
        return [cut_quantisation(item, mapping, count)]

    if isinstance(value, dict):
        cut = ((key, cut_quantisation(item, mapping, count)) for key, item in value.items())
        return {name: item for key, item in cut for name in renamed(key)}
    if isinstance(value, list):
        names = [name for item in value for name in renamed(item)]
        return list(dict.fromkeys(names)) if all(isinstance(n, str) for n in names) else names
    return value


def renumbering(count: int, removed: Sequence[int]) -> dict[int, int]:
    """Old block number to new, for the blocks that stay.

    Raises:
        ArchitectureError: a removed block does not exist, is named twice, or none would stay.
    """
    chosen = set(removed)
    if len(chosen) != len(list(removed)):
        raise ArchitectureError(f"a block is named twice among those to remove: {list(removed)}")
    outside = sorted(i for i in chosen if not 0 <= i < count)
    if outside:
        raise ArchitectureError(
            f"blocks to remove must be 0 to {count - 1}; got {', '.join(map(str, outside))}"
        )
    if len(chosen) == count:
        raise ArchitectureError(f"all {count} blocks would be removed; keep at least one")
    return {old: new for new, old in enumerate(i for i in range(count) if i not in chosen)}


def rename_pattern(entry: str, mapping: dict[int, int], count: int) -> list[str]:
    """The entries that replace one module name or pattern of a quantisation list.

    Args:
        entry: a module name, a glob, or a regular expression marked ``re:``.
        mapping: as from `renumbering`.
        count: blocks before the cut; numbers from ``count`` on (extra heads) are dropped.

    Returns:
        the entry itself when it names no block, none when it only named removed blocks.

    Raises:
        ArchitectureError: a number pattern that cannot be renumbered exactly.
    """
    match = _NUMBERED.search(entry)
    if match is None or any(word in entry[: match.start()] for word in (*OTHER_STACKS, "mtp")):
        return [entry]
    number = match.group(3)
    if number.isdigit():
        old = int(number)
        # A glob straight after the digits ("layers.1*") also names 10 to 19.
        if entry[match.end() :].startswith("*") and not entry.startswith("re:"):
            number += "*"
        else:
            return [_put(entry, match, str(mapping[old]))] if old in mapping else []
    if number in {"*", r"\d+", "[0-9]+"}:
        return [entry]
    if entry.startswith("re:") or not re.fullmatch(r"[0-9*?\[\]\-]+", number):
        raise ArchitectureError(
            f"quantisation entry {entry!r} names blocks by a pattern that cannot be renumbered "
            "exactly; write one entry per block"
        )
    old_numbers = [i for i in range(count) if fnmatch.fnmatchcase(str(i), number)]
    tail = entry[match.start(3) + len(number) :]
    rest = tail if tail else ".*"
    head = entry[: match.start(3)]
    return [f"{head}{mapping[i]}{rest}" for i in old_numbers if i in mapping]


def _put(entry: str, match: re.Match[str], number: str) -> str:
    return entry[: match.start(3)] + number + entry[match.end(3) :]


def refuse_packing(config: Mapping[str, Any]) -> None:
    """Refuse weights that can neither be measured nor proven where their packer is not.

    Raises:
        ArchitectureError: bitsandbytes packed them; the message has the way out.
    """
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict) and quantisation.get("quant_method") == "bitsandbytes":
        raise ArchitectureError(
            "the weights are packed by bitsandbytes; cut the checkpoint it was made from and "
            "quantise the result"
        )


def depth(text: dict[str, Any]) -> int:
    """Number of blocks in a decoder's configuration dictionary.

    Raises:
        ArchitectureError: it does not say.
    """
    for key in ("layers_block_type", "hybrid_override_pattern"):
        if text.get("model_type") == "nemotron_h" and isinstance(text.get(key), (list, str)):
            return len(text[key])
    for key in counted_by(text.get("model_type", "")):
        value = text.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ArchitectureError(
                    f"the configuration says {key}={value}; expected at least 1"
                )
            return value
    if reason := uncuttable(text):
        raise ArchitectureError(reason)
    raise ArchitectureError(
        f"the configuration does not say how many blocks the model has: expected one of "
        f"{', '.join(fields.COUNT)}"
    )


def written_out(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of a configuration, per-layer fields written out; a copy."""
    return materialise(copy.deepcopy(config))


def materialise(config: dict[str, Any]) -> dict[str, Any]:
    """Write out, in place, the per-layer fields that the config class would derive.

    Returns:
        the decoder's part of ``config``, as from `text_part`.
    """
    derived = config_object(config)
    text = text_part(config, derived)
    if derived is None:
        return text
    full = derived.get_text_config(decoder=True)
    values = full.to_dict()
    has_types = any(
        text.get(k) is not None
        for k in ("layer_types", "layers_block_type", "hybrid_override_pattern")
    )
    aliases = dict(getattr(full, "attribute_map", {}))
    for key in fields.WRITTEN_OUT:
        value = values.get(key)
        names = (key, *(alias for alias, real in aliases.items() if real == key))
        if value is None or any(text.get(name) is not None for name in names):
            continue
        if key in ("layer_types", "layers_block_type") and has_types:
            continue
        text[key] = copy.deepcopy(value)
    if "model_type" not in text:
        text["model_type"] = values.get("model_type", "")
    return text


def _as_read(config: dict[str, Any]) -> tuple[int | None, list[str]]:
    """How many blocks transformers reads from a configuration, and what it calls each of them.

    Where it does not say: None, and no types.
    """
    derived = config_object(config)
    text = None if derived is None else derived.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    listed = list(types) if isinstance(types, (list, tuple)) else []
    return None if text is None else count_of(text), listed


def _refuse_unclear(config: dict[str, Any], text: dict[str, Any], count: int) -> None:
    """Refuse a configuration that cannot be cut exactly, or that says what is not understood."""
    for key, harmless, reason in fields.DEPTH_DEPENDENT_FIELDS:
        if text.get(key, harmless) != harmless:
            raise ArchitectureError(f"{key}={text[key]!r}: {reason}; it cannot be cut exactly")
    if reason := uncuttable(text):
        raise ArchitectureError(reason)
    heads = extra_heads(text)
    for part, decoder in speaking_parts(config, text):
        check_fields(part)
        refuse_unknown(part, count, heads, decoder=decoder)
    derived = config_object(config)
    if derived is not None:
        values = derived.get_text_config(decoder=True).to_dict()
        more = {key: value for key, value in values.items() if key not in text}
        refuse_unknown(more, count, heads, decoder=True)


def uncuttable(text: Mapping[str, Any]) -> str:
    """Why a model of this type cannot be cut, whichever the state; empty where it can."""
    model_type = str(text.get("model_type", ""))
    reason = of_type(UNCUTTABLE, model_type)
    return f"{model_type} cannot be cut exactly: {reason}" if reason else ""


def extra_heads(text: Mapping[str, Any]) -> int:
    """Heads for further tokens that some checkpoints number on after the blocks."""
    found = [text.get(key) for key in fields.MTP]
    return max((n for n in found if isinstance(n, int)), default=0)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else words[:57] + "..."
