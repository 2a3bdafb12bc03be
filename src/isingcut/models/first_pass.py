"""One forward pass that looks at how a model calls its blocks, and what they hand on."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import ArchitectureError
from isingcut.memory import raise_if_exhausted
from isingcut.models.text_alone import on_text_alone

_NOT_ONE_AT_A_TIME = "such blocks can be cut, but not measured one at a time"
_HANDED_ON = (
    f"blocks hand something on to later blocks beside the residual stream: {_NOT_ONE_AT_A_TIME}"
)


@dataclass(frozen=True)
class Outputs:
    """What the blocks of a model return.

    Attributes:
        rest: for each block, what stands behind the stream in the tuple it returns; None where it
            returns the stream alone.
        bytes_per_token: of the residual stream, at its widest.
    """

    rest: tuple[tuple[Any, ...] | None, ...]
    bytes_per_token: int


class BlockCall:
    """The arguments that a block was called with, its hidden states apart.

    Attributes:
        hidden: the residual stream; None once it is not needed any more.
    """

    def __init__(
        self, hidden: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], keyword: bool
    ) -> None:
        self.hidden, self.args, self.kwargs, self.keyword = hidden, args, kwargs, keyword

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> BlockCall:
        """The call of block ``i``.

        Raises:
            ArchitectureError: there are no hidden states where they are expected.
        """
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs, keyword=False)
        if isinstance(kwargs.get("hidden_states"), Tensor):
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            return cls(kwargs["hidden_states"], args, rest, keyword=True)
        raise ArchitectureError(
            f"block {i} was called without hidden states as its first argument or as "
            "'hidden_states'; such a block cannot be replayed"
        )

    def repeat(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """What the block returns for other hidden states."""
        if self.keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


def learn_outputs(model: Any, blocks: Sequence[nn.Module], device: torch.device) -> Outputs:
    """Run four tokens through a model and look at its blocks.

    Raises:
        ArchitectureError: the blocks do not pass one residual stream on, and nothing else; or the
            model does not run on text alone.
    """
    ids = torch.zeros((1, 4), dtype=torch.long, device=device)
    streams: list[Tensor] = []
    rest: list[tuple[Any, ...] | None] = []
    calls: list[tuple[nn.Module, BlockCall]] = []
    shared: dict[int, _Shared] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for name, value in kwargs.items():
            if isinstance(value, MutableMapping):
                watched = shared.setdefault(id(value), _Shared(value))
                watched.block = len(calls)
                kwargs = {**kwargs, name: watched}
        call = BlockCall.split(args, kwargs, len(rest))
        stream = call.hidden
        assert stream is not None
        if streams and stream is not streams[-1] and not torch.equal(stream, streams[-1]):
            raise ArchitectureError(
                f"the model changes the residual stream before block {len(rest)} "
                f"({type(module).__name__}): {_NOT_ONE_AT_A_TIME}"
            )
        calls.append((module, call))
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, (list, tuple)) and output else output
        if not isinstance(stream, Tensor):
            raise ArchitectureError(
                f"block {len(rest)} ({type(module).__name__}) returns {type(output).__name__}; "
                "expected hidden states, or a tuple that starts with them"
            )
        if stream.shape[:2] != ids.shape:
            raise ArchitectureError(
                f"block {len(rest)} ({type(module).__name__}) passes on a stream of shape "
                f"{list(stream.shape)}, expected (batch, tokens, width): {_NOT_ONE_AT_A_TIME}"
            )
        if _reads_another(calls[-1][1], module, stream, rest):
            raise ArchitectureError(_HANDED_ON)
        streams.append(stream)
        rest.append(tuple(output[1:]) if isinstance(output, (list, tuple)) else None)

    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(after) for b in blocks]
    try:
        with torch.no_grad(), on_text_alone(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    _refuse_uncalled(blocks, [module for module, _ in calls])
    if any(watched.handed_on for watched in shared.values()):
        raise ArchitectureError(_HANDED_ON)
    width = max(s[0, 0].numel() * s.element_size() for s in streams)
    return Outputs(tuple(rest), width)


def _refuse_uncalled(blocks: Sequence[nn.Module], called: Sequence[nn.Module]) -> None:
    silent = [i for i, block in enumerate(blocks) if not any(block is c for c in called)]
    if silent:
        raise ArchitectureError(
            f"text alone does not run the blocks {', '.join(map(str, silent))}, so what they are "
            "worth cannot be measured (they may read images): such blocks can be cut, but not "
            "measured"
        )
    if len(called) != len(blocks):
        raise ArchitectureError(
            f"{len(blocks)} blocks were found, but a forward pass made {len(called)} calls of "
            "them; each must be called exactly once"
        )


def _reads_another(
    call: BlockCall, block: nn.Module, stream: Tensor, rest: Sequence[tuple[Any, ...] | None]
) -> bool:
    """Whether a block needs a tensor that an earlier one returned beside the stream.

    Some are handed one that they leave alone, so the block runs again without.
    """
    beside = {id(v) for one in rest for v in one or () if isinstance(v, Tensor)}
    if not any(id(v) in beside for v in (*call.args, *call.kwargs.values())):
        return False
    assert call.hidden is not None
    args = tuple(None if id(v) in beside else v for v in call.args)
    kwargs = {k: None if id(v) in beside else v for k, v in call.kwargs.items()}
    without = BlockCall(call.hidden, args, kwargs, call.keyword)
    try:
        output = without.repeat(block.forward, call.hidden)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise_if_exhausted(error)
        return True
    return not torch.equal(output[0] if isinstance(output, (list, tuple)) else output, stream)


class _Shared(UserDict[Any, Any]):
    """A mapping that all blocks are given, and whether one reads what another wrote there.

    Gemma 4 lets the last block of each type write, whether or not a later one reads.
    """

    def __init__(self, value: MutableMapping[Any, Any]) -> None:
        self.data: Any = value
        self.block = 0
        self.handed_on = False
        self._writer: dict[Any, int] = {}

    def __setitem__(self, key: Any, item: Any) -> None:
        self._writer[key] = self.block
        self.data[key] = item

    def __getitem__(self, key: Any) -> Any:
        self.handed_on |= self._writer.get(key, self.block) != self.block
        return self.data[key]
