"""Model families that need more than the tables in `fields`.

A period may be expanded before the tables are applied. Linear constraints for the solver may forbid
states. Families are recognised by the fields they use, or by model type.

If images enter a model between its text blocks, its configuration has the numbers of those blocks,
in the vision tower's part or at the root. A run on text alone does not reveal this.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import ArchitectureError
from isingcut.formats.architectures import fields
from isingcut.formats.architectures.fields import STAY, TWO_STAY, config_object, of_type
from isingcut.ising.constraints import LinearConstraint

_ATTENTION = (
    "at least one attention block stays, because generation reads the sequence length from an "
    "attention cache"
)
_RECEIVES = "image features (DeepStack) join the stream behind the first {} blocks, by their number"
_ENTERS = "image features join the stream in front of blocks {}"


def write_out(text: dict[str, Any], count: int) -> None:
    """Replace ``decoder_sparse_step``, in place, by the equivalent list ``mlp_only_layers``."""
    step = text.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        listed = set(text.get("mlp_only_layers") or ())
        text["mlp_only_layers"] = [
            i for i in range(count) if i in listed or (i + 1) % step
        ]
        text["decoder_sparse_step"] = 1


def find_fixed_blocks(
    config: dict[str, Any], text: dict[str, Any], count: int
) -> dict[int, str]:
    """Return the blocks that must stay, each with the reason.

    Args:
        config: the whole configuration of a checkpoint.
        text: the decoder's part of it, with its per-layer fields written out.
        count: number of blocks of the decoder.
    """
    fixed: dict[int, str] = {}
    model_type = str(text.get("model_type", ""))
    if rule := of_type(STAY, model_type):
        fixed[rule[0] % count] = rule[1]
    if model_type in {"zamba", "zamba2"}:
        types = text.get("layers_block_type") or text.get("layer_types") or []
        reason = "hybrid blocks take turns with shared weights, so their number and order are fixed"
        fixed |= {i: reason for i, kind in enumerate(types) if kind == "hybrid"}
    shared = text.get("num_kv_shared_layers")
    if isinstance(shared, int) and 0 < shared < count:
        if not isinstance(text.get("layer_types"), list):
            raise ArchitectureError(
                f"the configuration has num_kv_shared_layers={shared} and no list 'layer_types', "
                "which says whose keys and values are shared; write it out"
            )
        first = count - shared
        last_of_kind = {kind: i for i, kind in enumerate(text["layer_types"][:first])}
        for kind, i in last_of_kind.items():
            fixed[i] = (
                f"blocks from {first} on read the keys and values of this {kind} block"
            )
    entered: set[int] = set()
    for path, value in _find(config, fields.IMAGE_ENTRIES):
        with fields.catch_unknown_form(path[-1], value):
            ends = (
                item[-1] if isinstance(item, (list, tuple)) else item for item in value
            )
            entered |= {range(count)[i] for i in ends if 0 <= i < count}
    fixed |= dict.fromkeys(
        entered, _ENTERS.format(", ".join(map(str, sorted(entered))))
    )
    features = max(
        (len(value) for _, value in _find(config, fields.DEEPSTACK)), default=0
    )
    received = dict.fromkeys(range(min(features, count)), _RECEIVES.format(features))
    return fixed | received


def _sources(name: str, value: Any, count: int) -> Iterator[tuple[int, int, str]]:
    """Yield the pairs of blocks of one field where the first may stay only if the second stays, and
    why. Errors of an unknown form are not converted."""
    blocks = range(count)
    full = None
    if name in fields.RANKED:
        for before, after in pairwise(sorted(blocks.index(i - 1) for i in value)):
            reason = f"what block {after} computes depends on how many of {name} come before it"
            yield after, before, reason
        return
    for i, source in enumerate(value[:count]):
        if name in fields.SOURCES:
            if source != i:
                yield i, source, f"block {i} reads the keys and values of {source}"
        elif source != "shared":
            full = i
        elif full is not None:
            yield (
                i,
                full,
                f"block {i} attends to the tokens that the indexer of {full} picks",
            )


def fills_cache(kind: str) -> bool:
    """Whether blocks of a transformers layer type fill an attention cache."""
    return ("attention" in kind and "linear" not in kind) or "hybrid" in kind


def legality(
    config: dict[str, Any], text: dict[str, Any], n: int, attention: Sequence[int] = ()
) -> list[LinearConstraint]:
    """Return the linear constraints of a configuration, which every state must satisfy.

    Args:
        config, text: as in `find_fixed_blocks`.
        n: number of blocks of the decoder.
        attention: blocks that fill an attention cache, if known.
    """
    types: Any = text.get("layer_types")
    with fields.catch_unknown_form("layer_types", types):
        rows = [
            LinearConstraint(f"keep block {i}", _row(n, [i]), "==", 0.0, reason)
            for i, reason in find_fixed_blocks(config, text, n).items()
        ]
    for name in ("indexer_types", *fields.SOURCES, *fields.RANKED):
        value = text.get(name) or ()
        with fields.catch_unknown_form(name, value):
            for i, source, reason in _sources(name, value, n):
                row = _row(n, [source], [i])
                rows.append(
                    LinearConstraint(f"keep {source} for {i}", row, "<=", 0.0, reason)
                )
    if 0 < len(attention) < n:
        row = _row(n, attention)
        most = len(attention) - 1.0
        rows.append(LinearConstraint("keep attention", row, "<=", most, _ATTENTION))
    if why := of_type(TWO_STAY, text.get("model_type")):
        rows.append(LinearConstraint("keep two", np.ones(n), "<=", n - 2.0, why))
    periods = [v for p in fields.PERIODS if isinstance(v := text.get(p), int)]
    # Zamba has a period as well as the full list.
    listed = isinstance(text.get("layers_block_type"), list)
    if len(periods) == len(fields.PERIODS) and not listed:
        rows.extend(_whole_periods(n, lcm(*periods)))
    return rows


def _whole_periods(n: int, period: int) -> list[LinearConstraint]:
    """Return constraints to remove aligned groups of ``period`` blocks only as a whole, and blocks
    of an incomplete last group only from its end."""
    reason = f"block kinds repeat every {period} blocks in the configuration"
    rows = []
    for i in range(n - 1):
        if (i + 1) % period:
            row = _row(n, [i], [i + 1])
            name = f"period {i},{i + 1}"
            whole = (i // period + 1) * period <= n
            rows.append(
                LinearConstraint(name, row, "==" if whole else "<=", 0.0, reason)
            )
    return rows


def _row(n: int, plus: Sequence[int], minus: Sequence[int] = ()) -> NDArray[np.float64]:
    row = np.zeros(n)
    row[[*plus]] = 1.0
    row[[*minus]] = -1.0
    return row


def move_images(config: dict[str, Any], mapping: Mapping[int, int]) -> None:
    """Renumber, in place, the blocks in front of which image features join the stream.

    Args:
        config: the whole configuration of a checkpoint.
        mapping: new number of each kept block, by its old number; must satisfy `legality`.
    """

    def move(block: int) -> int:
        return mapping.get(block, block)  # A number beyond the blocks is never reached.

    for path, value in list(_find(config, fields.IMAGE_ENTRIES)):
        part = config
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = [
            [*item[:-1], move(item[-1])]
            if isinstance(item, (list, tuple))
            else move(item)
            for item in value
        ]


def _find(
    config: dict[str, Any], names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the lists with these names, defaults of the class included, each with its keys."""
    derived = config_object(config)

    def walk(
        part: dict[str, Any], path: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in part.items():
            if key in names and isinstance(value, (list, tuple)):
                yield (*path, key), value
            elif isinstance(value, dict):
                yield from walk(value, (*path, key))

    return walk(config if derived is None else derived.to_dict(), ())
