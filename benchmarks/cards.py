"""Fake GPUs: tensors that report a card as device, reject other devices, and count their memory.

A tensor on a fake card keeps its numbers in a CPU tensor, so that programs run with real values.
It follows the rules of a GPU: an operation that mixes devices is an error, except a copy,
CPU tensors as indices, and CPU tensors of no dimensions in elementwise operations; `numpy()` is an
error; a CPU generator cannot be used. Two cards are two devices.

Each card has a ledger: the bytes of all live storages on it, their peak, and a budget. An
allocation beyond the budget raises `torch.OutOfMemoryError`, as CUDA does.

The device is torch's "lazy" type, which has no kernels and no process-wide settings. Within the
context, `torch.get_device_module` supports it.

Not simulated: GPU kernels, their rounding and their workspace (the CPU computes everything);
fragmentation and rounding of an allocator; concurrent streams, events and copies; operations that a
CPU has and a GPU lacks; reads of custom kernels (Triton, CUDA); casts of autocast other than the
operands of matrix products; a gradient on another device than its tensor (torch exempts tensor
subclasses).
"""

from __future__ import annotations

import contextlib
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TYPE = "lazy"
_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._to_copy}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# Operations besides elementwise ones that accept a number in a CPU tensor.
_VALUED = {*_INDEXED, _aten.masked_fill, _aten.masked_fill_, _aten.fill, _aten.fill_}
_RESIZING = {_aten.set_, _aten.resize_}
# The operations that autocast computes in half precision.
_HALVED = {
    *(functional.linear, functional.scaled_dot_product_attention, functional.conv1d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
}


class MixedDevicesError(RuntimeError):
    """An operation mixed tensors of two devices."""


class Card:
    """One fake card and its ledger.

    Attributes:
        device: torch device, for ``model.to(...)`` and ``device=``.
        budget: maximum of live bytes; None: no limit.
        live: bytes of the live storages.
        peak: largest number of live bytes since `reset_peak`.
    """

    def __init__(self, index: int, budget: int | None = None) -> None:
        self.device = torch.device(_TYPE, index)
        self.budget = budget
        self.live = self.peak = 0
        self._storages: weakref.WeakValueDictionary[int, _Storage] = (
            weakref.WeakValueDictionary()
        )

    def reset_peak(self) -> None:
        """Restart the peak from the current value."""
        self.peak = self.live

    def storage_of(self, values: Tensor) -> _Storage:
        """Return the ledger's entry for the storage of a tensor, new or known.

        Raises:
            torch.OutOfMemoryError: a new storage exceeds the budget.
        """
        storage = values.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None:
            known = self._storages[storage._cdata] = _Storage(self, storage.nbytes())
        return known


class _Storage:
    """Bytes on a card, freed with the last tensor that uses them."""

    def __init__(self, card: Card, size: int) -> None:
        self.card = card
        self.size = 0
        if card.budget is not None and card.live + size > card.budget:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU {card.device.index} has "
                f"a total capacity of {card.budget} bytes of which {card.budget - card.live} bytes "
                "are free."
            )
        self.size = size
        card.live += size
        card.peak = max(card.peak, card.live)

    def __del__(self) -> None:
        self.card.live -= self.size


@contextlib.contextmanager
def fake_cards(count: int = 1, budget: int | None = None) -> Iterator[list[Card]]:
    """Provide fake cards in this thread, within the context.

    Args:
        count: number of cards.
        budget: bytes of each; None: no limit.

    Raises:
        MixedDevicesError: devices were mixed; raised again at the end if the code caught it.
    """
    cards = [Card(index, budget) for index in range(count)]
    mode = _Mode(cards)
    cast = _Autocast()
    module_of = torch.get_device_module
    module = _DeviceModule(cards)

    def device_module(device: Any = None) -> Any:
        named = device is not None and torch.device(device).type == _TYPE
        return module if named else module_of(device)

    # `torch.tensor(..., device=...)` creates it on the CPU, then moves it through the mode.
    torch._C._set_only_lift_cpu_tensors(True)
    _CARDS.append(cards)
    try:
        with (
            # Load without other threads: the mode below applies to this thread only.
            mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
            # For transformers' Trainer, the first card is a GPU with bfloat16 and a fused AdamW.
            mock.patch.dict("os.environ", {"ACCELERATE_TORCH_DEVICE": f"{_TYPE}:0"}),
            mock.patch(
                "transformers.training_args.is_torch_bf16_gpu_available",
                return_value=True,
            ),
            mock.patch(
                "torch.optim.optimizer._get_fused_kernels_supported_devices",
                return_value=[_TYPE, "cpu"],
            ),
            _patch("torch.autocast", cast.context),
            _patch("torch.amp.autocast", cast.context),
            _patch("torch.amp.is_autocast_available", lambda device_type: True),
            _patch("torch.is_autocast_enabled", cast.is_enabled),
            _patch("torch.get_autocast_dtype", cast.get_dtype),
            mock.patch("torch.get_device_module", device_module),
            mock.patch(f"torch.{_TYPE}", module, create=True),
            mode,
        ):
            yield cards
    finally:
        _CARDS.pop()
        torch._C._set_only_lift_cpu_tensors(False)
    if mode.mixed:
        raise mode.mixed[0]


def _patch(name: str, ours: Callable[..., Any]) -> Any:
    """Patch a torch function for the device type of the cards, which is its first argument."""
    torchs = pkgutil.resolve_name(name)

    def function(device_type: Any = None, *args: Any, **kwargs: Any) -> Any:
        if device_type == _TYPE:
            return ours(device_type, *args, **kwargs)
        return torchs(*(() if device_type is None else (device_type,)), *args, **kwargs)

    return mock.patch(name, function)


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Autocast(TorchFunctionMode):
    """Autocast: casts operands of matrix products; float32 weights once per outermost context."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self._depth = 0
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def is_enabled(self, device_type: str) -> bool:
        return self.dtype is not None

    def get_dtype(self, device_type: str) -> torch.dtype:
        return self.dtype or torch.bfloat16

    @contextlib.contextmanager
    def context(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        **rest: Any,
    ) -> Iterator[None]:
        before = self.dtype
        self.dtype = (dtype or torch.bfloat16) if enabled else None
        self._depth += 1
        try:
            with self if self._depth == 1 else contextlib.nullcontext():
                yield
        finally:
            self.dtype = before
            self._depth -= 1
            if not self._depth:
                self._weights.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        if self.dtype is not None and func in _HALVED:
            args, kwargs = _replace((args, kwargs or {}), _Tensor, self._cast)
        return func(*args, **(kwargs or {}))

    def _cast(self, x: Tensor) -> Tensor:
        assert self.dtype is not None
        if x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(self.dtype)
        if id(x) not in self._weights:
            self._weights[id(x)] = x, x.to(self.dtype)
        return self._weights[id(x)][1]


_CARDS: list[list[Card]] = []


@dataclass(frozen=True)
class _DeviceModule:
    """The counterpart of `torch.cuda`, as far as isingcut uses it."""

    cards: list[Card]

    def _card(self, device: Any = None) -> Card:
        index = None if device is None else torch.device(device).index
        return self.cards[index or 0]

    def device_count(self) -> int:
        return len(self.cards)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        card = self._card(device)
        total = 1 << 60 if card.budget is None else card.budget
        return total - card.live, total

    def memory_allocated(self, device: Any = None) -> int:
        return self._card(device).live

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._card(device).peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._card(device).reset_peak()

    def empty_cache(self) -> None:
        """Do nothing, because nothing is cached."""

    def synchronize(self, device: Any = None) -> None:
        """Do nothing, because operations are synchronous."""

    def current_stream(self, device: Any = None) -> Any:
        return _Stream()

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def Stream(self, device: Any = None) -> Any:
        return _Stream()

    def Event(self) -> Any:
        return _Stream()


class _Stream:
    """A stream or an event of a card that does everything synchronously."""

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _Tensor(Tensor):
    """A tensor on a card: its numbers are in ``values``, on the CPU."""

    values: Tensor  # type: ignore[assignment]
    storage_entry: _Storage

    @staticmethod
    def __new__(cls, values: Tensor, card: Card) -> _Tensor:
        entry = card.storage_of(values)
        make: Any = Tensor._make_wrapper_subclass
        # A view of a tensor made outside inference mode is not an inference tensor either.
        with torch.inference_mode(values.is_inference()):
            self: _Tensor = make(
                cls,
                values.shape,
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=card.device,
            )
        self.values = values
        self.storage_entry = entry
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def card(self) -> Card:
        """The card of the tensor."""
        return self.storage_entry.card

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    # With these two methods, `Module.to` exchanges whole tensors instead of setting `data`.
    def __tensor_flatten__(self) -> tuple[list[str], Card]:
        return ["values"], self.card

    @staticmethod
    def __tensor_unflatten__(
        inner: Any, context: Card, size: Any, stride: Any
    ) -> _Tensor:
        return _Tensor(inner["values"], context)

    @property
    def data(self) -> Tensor:
        """The tensor without its autograd history."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, _Tensor) or value.card is not self.card:
            raise MixedDevicesError(
                f"Expected data on {self.device}, found it on {value.device}"
            )
        assert value.shape == self.shape
        assert value.dtype == self.dtype
        self.values = value.values
        self.storage_entry = value.storage_entry

    def __format__(self, spec: str) -> str:
        # torch's own method formats plain tensors only.
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        """Return the numbers; torch's own method rejects subclasses."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise torch's error for GPU tensors, unless forced; a subclass would not raise it."""
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def data_ptr(self) -> int:
        """Return the address of the first number."""
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the numbers."""
        return self.values.untyped_storage()

    def set_(self, *source: Any) -> _Tensor:
        """Return a view of a storage: a new tensor, because this one cannot change its shape."""
        return _Tensor(torch.empty(0, dtype=self.dtype).set_(*source), self.card)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the numbers only; loading chooses the device."""
        plain: Any = self.cpu()
        return plain.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.values!r} on {self.device}"


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Creates new tensors on the cards, and records mixed devices."""

    def __init__(self, cards: list[Card]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cards = cards
        self.mixed: list[MixedDevicesError] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        try:
            if func._can_decompose() and (
                torch.is_inference_mode_enabled()
                or any(isinstance(x, Tensor) and x.is_inference() for x in args)
            ):
                # For other tensors, autograd has decomposed such operations already.
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            return _run(func, args, kwargs or {})
        except MixedDevicesError as e:
            self.mixed.append(e)
            raise


def _run(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Check the devices of the operands, compute on the CPU, and put the result on its device."""
    card = next(
        (x.card for x in _leaves((args, kwargs)) if isinstance(x, _Tensor)), None
    )
    device = kwargs.get("device")
    if card and (
        func.overloadpacket in _RESIZING or torch.Tag.inplace_view in func.tags
    ):
        raise NotImplementedError(
            f"{func} changes the shape of a tensor on a fake card"
        )
    if card and func.overloadpacket not in _COPIES:
        _check(func, args, kwargs, card)
    if device is not None:
        card = _CARDS[-1][device.index or 0] if device.type == _TYPE else None
        generator = kwargs.get("generator")
        if card and generator is not None and generator.device.type != _TYPE:
            raise MixedDevicesError(
                f"Expected a generator on {card.device} for {func}, found a CPU one"
            )
        if card:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
    plain_args, plain_kwargs = _replace((args, kwargs), _Tensor, lambda x: x.values)
    if (
        card
        and func.overloadpacket is _aten.histc
        and not plain_args[0].is_floating_point()
    ):
        # CUDA's histc supports integers, the CPU's does not.
        numbers, *rest = plain_args
        out = func(numbers.double(), *rest, **plain_kwargs).to(numbers.dtype)
    else:
        out = func(*plain_args, **plain_kwargs)
    if card is None:
        return out
    if written := _written(func, args, kwargs):
        return written[0] if len(written) == 1 else tuple(written)
    return _replace(out, Tensor, lambda x: _Tensor(x, card))


# torch's own functions to traverse arguments take longer than the computation.
def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _replace(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, dict):
        return {name: _replace(part, kind, new) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(part, kind, new) for part in value)
    return value


def _written(func: Any, args: Args, kwargs: Kwargs) -> list[Any]:
    """Return the operands that the operation writes to and returns."""
    if not any(map(_is_written, func._schema.returns)):
        return []
    return [v for a, v in _operands(func, args, kwargs) if _is_written(a)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _operands(func: Any, args: Args, kwargs: Kwargs) -> Iterator[tuple[Any, Any]]:
    """Yield each given argument of the schema, with its value."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _check(func: Any, args: Args, kwargs: Kwargs, card: Card) -> None:
    packet = func.overloadpacket
    numbers = torch.Tag.pointwise in func.tags or packet in _VALUED
    for argument, value in _operands(func, args, kwargs):
        writes = _is_written(argument)
        indices = packet in _INDEXED and argument.name == "indices"
        for x in _leaves(value):
            if not isinstance(x, Tensor) or x.device.type == "meta":
                continue
            plain = indices or not (x.dim() or writes or not numbers)
            fits = x.card is card if isinstance(x, _Tensor) else plain
            if not fits:
                raise MixedDevicesError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {card.device} and {x.device}! (argument {argument.name} of {func})"
                )
