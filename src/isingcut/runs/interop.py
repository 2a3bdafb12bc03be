"""States in and out of other tools: lists of blocks from any text, recipes for mergekit."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isingcut.errors import ArchitectureError, InputError
from isingcut.inputs import parse_json, read_text, user_path
from isingcut.models.checkpoint.read import read_config
from isingcut.options.spellings import block_span, expanded

if TYPE_CHECKING:
    from isingcut.options.config import RunConfig

_STDIN = "-"
_LONGEST = 2**20
_DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


@dataclass(frozen=True)
class NamedBlocks:
    """Block numbers as a text names them, not yet compared with a model.

    Attributes:
        numbers: ascending, each once.
        where: what messages call the text.
        one_based: they count from 1.
    """

    numbers: tuple[int, ...]
    where: str
    one_based: bool = False

    def of(self, total: int) -> list[int]:
        """The removed blocks of a model of ``total`` blocks, counted from 0.

        Raises:
            InputError: a block that the model does not have.
        """
        first = 1 if self.one_based else 0
        last = total - 1 + first
        wrong = [b for b in self.numbers if not first <= b <= last]
        if wrong:
            hint = ""
            if wrong == [total] and not self.one_based and self.numbers[0] > 0:
                hint = "; if the list counts from 1, add --one-based"
            elif self.one_based and wrong == [0]:
                hint = "; if the list counts from 0, leave --one-based away"
            named = ", ".join(str(b) for b in wrong[:8]) + (", ..." if len(wrong) > 8 else "")
            raise InputError(
                f"{self.where}: this model's blocks are numbered {first} to {last}, got "
                f"{named}{hint}"
            )
        return [b - first for b in self.numbers]


def read_blocks(source: str, *, one_based: bool = False) -> NamedBlocks:
    """The removed blocks that a text names, from the text itself, ``@FILE`` or ``-`` (stdin).

    Args:
        source: ``"3,4,9"``, ``"@blocks.txt"`` or ``"-"``.
        one_based: the text counts blocks from 1, as papers often do.

    Raises:
        InputError: no plain file of at most 1 MiB, or no list of block numbers.
    """
    if source == _STDIN:
        text, where = _piped(), "standard input"
    elif source.startswith("@"):
        path = user_path(source[1:])
        text, where = read_text(path, f"--blocks {source}:", limit=_LONGEST), str(path)
    else:
        text, where = source, f"--blocks {source if len(source) < 60 else source[:57] + '...'}"
    return NamedBlocks(tuple(parse_blocks(text, where)), where, one_based)


def _piped() -> str:
    try:
        text = sys.stdin.read(_LONGEST + 1)
    except UnicodeDecodeError as e:
        raise InputError("standard input is no UTF-8 text; expected block numbers") from e
    if len(text) > _LONGEST:
        raise InputError(
            f"standard input has more than {_LONGEST} characters; expected block numbers"
        )
    return text


def parse_blocks(text: str, where: str = "the list") -> list[int]:
    """Block numbers out of a text: commas, spaces, lines, ``5-8``, JSON, or our own records.

    Raises:
        InputError: empty, something that is no block number, or one above 99,999.

    >>> parse_blocks("3, 4 9"), parse_blocks("[3, 4, 9]"), parse_blocks("3\\n4-6 # middle")
    ([3, 4, 9], [3, 4, 9], [3, 4, 5, 6])
    >>> parse_blocks('{"removed": [3, 4]}')
    [3, 4]
    """
    try:
        items = _items(parse_json(text), where)
    except ValueError:
        lines = (line.partition("#")[0] for line in text.splitlines())
        items = [part for line in lines for part in re.split(r"[\s,;]+", line.strip("[]() \t"))]
    spans = []
    for item in items:
        if item == "":
            continue
        plain = isinstance(item, str | int) and not isinstance(item, bool)
        try:
            span = block_span(str(item)) if plain else None
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        if span is None:
            raise InputError(
                f"{where}: {str(item)[:40]!r} is no block number; expected numbers apart by "
                "commas, spaces or lines (3,4,9 or 5-8), or a JSON list"
            )
        spans.append(span)
    if not spans:
        raise InputError(f"{where} names no block; expected a list like 3,4,9")
    return expanded(spans)


def _items(value: Any, where: str) -> Sequence[Any]:
    """The list in a JSON value: the value itself, or what a results file calls removed."""
    if isinstance(value, dict):
        held = value.get("removed", value.get("chosen", {}))
        value = held.get("removed") if isinstance(held, dict) else held
        if not isinstance(value, list):
            raise InputError(f'{where}: a JSON object needs its blocks as "removed": [...]')
    return value if isinstance(value, list) else [value]


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
    import yaml

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
    from isingcut.models.architectures import surgery

    cut = surgery.cut_config(config, removed)
    theirs = copy.deepcopy(config)
    original = surgery.materialise(copy.deepcopy(config))
    text = _decoder(theirs, original)
    for key in _DEPTH_FIELDS:
        if isinstance(text.get(key), int):
            text[key] -= len(removed)
    ours = surgery.materialise(cut)
    try:
        other = surgery.materialise(copy.deepcopy(theirs))
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
    from isingcut.models.sources import hub_id, resolve

    folder = resolve(config.model, trust_remote_code=config.trust_remote_code)
    raw = read_config(folder)
    text: dict[str, Any] = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    stored = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return hub_id(config.model) or str(folder), str(stored), mergekit_differs(raw, removed)
