"""Recipes for mergekit, which stacks the kept blocks of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from isingcut.errors import ArchitectureError
from isingcut.models.architectures.surgery import cut_config, materialise, written_out
from isingcut.models.checkpoint.read import read_config
from isingcut.models.sources import hub_id, resolve

if TYPE_CHECKING:
    from isingcut.options.config import RunConfig

_DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def kept_ranges(total: int, removed: Sequence[int]) -> list[tuple[int, int]]:
    """The kept blocks as half-open ranges.

    >>> kept_ranges(8, [2, 3, 6])
    [(0, 2), (4, 6), (7, 8)]
    """
    gone = set(removed)
    ranges: list[tuple[int, int]] = []
    for block in range(total):
        if block in gone:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def mergekit_recipe(model: str, total: int, removed: Sequence[int], dtype: str) -> str:
    """A mergekit configuration that stacks the kept blocks: the method ``passthrough``.

    Args:
        model: what mergekit is to read: a hub id or a folder.
        total: how many blocks the model has.
        removed: block numbers from 0.
        dtype: of the written tensors, for example ``"bfloat16"``.
    """
    slices = [
        {"sources": [{"model": model, "layer_range": [first, end]}]}
        for first, end in kept_ranges(total, removed)
    ]
    head = (
        f"# {model} without {len(removed)} of its {total} blocks (numbered from 0): "
        f"{' '.join(str(b) for b in sorted(removed))}\n"
    )
    content = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def mergekit_differs(config: dict[str, Any], removed: Sequence[int]) -> list[str]:
    """Fields of ``config.json`` that a cut changes and mergekit, which only sets the depth, not.

    Args:
        config: the original's ``config.json``.
        removed: block numbers from 0.

    Returns:
        names, sorted; empty where the recipe gives the same model as `excise`.

    Raises:
        ArchitectureError: the state cannot be cut.
    """
    cut = cut_config(config, removed)
    theirs = copy.deepcopy(config)
    original = written_out(config)
    text = _decoder(theirs, original)
    for key in _DEPTH_FIELDS:
        if isinstance(text.get(key), int):
            text[key] -= len(removed)
    ours = materialise(cut)
    try:
        other = written_out(theirs)
    except ArchitectureError:
        # Transformers cannot even read it, because lists keep their old length: compare as stored.
        ours, other = {k: ours.get(k) for k in text}, text
    names = {k for k in {*ours, *other} if ours.get(k) != other.get(k)}
    if "layer_types" not in names:
        # Rules that only say how the list of types is derived.
        names -= {"max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
    return sorted(n for n in names if not _says_nothing(ours.get(n), other.get(n)))


def _decoder(config: dict[str, Any], materialised: dict[str, Any]) -> dict[str, Any]:
    """The part of ``config`` that describes the decoder."""
    for value in config.values():
        if isinstance(value, dict) and value.get("model_type") == materialised.get("model_type"):
            return value
    return config


def _says_nothing(ours: Any, theirs: Any) -> bool:
    """Whether a per-layer list is written out on one side only, and alike for every block."""
    if (ours is None) == (theirs is None):
        return False
    value = theirs if ours is None else ours
    return isinstance(value, list) and len({str(v) for v in value}) <= 1


def mergekit_source(config: RunConfig, removed: Sequence[int]) -> tuple[str, str, list[str]]:
    """What a recipe for a run says of its model: name, dtype, and `mergekit_differs`.

    Args:
        config: its options, with the model named as it can be found from here.
    """
    folder = resolve(config.model, trust_remote_code=config.trust_remote_code)
    raw = read_config(folder)
    text: dict[str, Any] = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    stored = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return hub_id(config.model) or str(folder), str(stored), mergekit_differs(raw, removed)
