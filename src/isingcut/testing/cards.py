"""A second device without hardware: tensors that say they are on it, and refuse the CPU's.

A tensor on the fake device holds its numbers in a CPU tensor, so that a whole path runs, with real
values and all that depends on them; but it meets others by the rules of a GPU. An operation that
mixes both devices is an error, except a copy, CPU tensors as indices, and CPU tensors of no
dimensions in elementwise operations; `numpy()` is an error; a CPU generator draws nothing there.

The device is torch's "lazy" type, which has no kernels of its own and no settings of the process.

What this cannot see: kernels and their rounding (the CPU's compute everything), streams, events,
pinned memory and whatever else stands behind ``device.type == "cuda"``; memory that runs out;
operations that a CPU has and a GPU lacks; what custom kernels (Triton, CUDA) read; two GPUs; a
gradient on another device than what it is the gradient of (torch exempts tensor subclasses).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DEVICE", "MixedDevicesError", "fake_device"]

DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._to_copy}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# Beside elementwise operations, those whose value may be a number in a CPU tensor.
_VALUED = {*_INDEXED, _aten.masked_fill, _aten.masked_fill_, _aten.fill, _aten.fill_}
_NOT_HELD = {_aten.set_, _aten.resize_}


class MixedDevicesError(RuntimeError):
    """Tensors of both devices met in one operation."""


@contextlib.contextmanager
def fake_device() -> Iterator[torch.device]:
    """Lend the fake device, usable in this thread while the context lasts.

    Yields:
        the device, for ``model.to(...)`` and ``device=``.

    Raises:
        MixedDevicesError: where devices mix; at the end, too, if the code caught the first one.
    """
    mode, autocast, enabled = _Mode(), torch.autocast, torch.is_autocast_enabled

    def no_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == DEVICE.type:
            return contextlib.nullcontext()
        return autocast(device_type, *args, **kwargs)

    def not_enabled(*args: Any) -> bool:
        return args[:1] != (DEVICE.type,) and enabled(*args)

    # `torch.tensor(..., device=...)`: the CPU makes it, then it is moved, by way of the mode.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch("torch.autocast", no_autocast),
            mock.patch("torch.is_autocast_enabled", not_enabled),
            mode,
        ):
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
    if mode.mixed:
        raise mode.mixed[0]


class _Tensor(Tensor):
    """A tensor on the device: its numbers are in ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Tensor:
        make: Any = Tensor._make_wrapper_subclass
        # A view of a tensor that was made outside inference mode is no inference tensor either.
        with torch.inference_mode(held.is_inference()):
            self: _Tensor = make(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    # With these two, `Module.to` exchanges whole tensors instead of setting `data`.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> _Tensor:
        return _Tensor(inner["held"])

    @property
    def data(self) -> Tensor:
        """Its numbers without its history."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, _Tensor):
            raise MixedDevicesError(f"Expected data on {self.device}, found it on {value.device}")
        assert value.shape == self.shape
        assert value.dtype == self.dtype
        self.held = value.held

    def __format__(self, spec: str) -> str:
        # torch's own formats plain tensors only.
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        """The numbers; torch's own refuses subclasses."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused in torch's words, which a subclass would not get."""
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def data_ptr(self) -> int:
        """Where the numbers begin."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the numbers are."""
        return self.held.untyped_storage()

    def set_(self, *source: Any) -> _Tensor:
        """A view of a storage: a new tensor, as this one cannot change its shape."""
        return _Tensor(torch.empty(0, dtype=self.dtype).set_(*source))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes new tensors on the device, and remembers where devices mixed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mixed: list[MixedDevicesError] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            if torch.is_inference_mode_enabled() and func._can_decompose():
                # Outside inference mode autograd has taken such operations apart already.
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            return _run(func, args, kwargs or {})
        except MixedDevicesError as e:
            self.mixed.append(e)
            raise


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check where the operands are, compute on the CPU, and put the result where it belongs."""
    ours = any(isinstance(x, _Tensor) for x in tree.tree_leaves((args, kwargs)))
    device = kwargs.get("device")
    if ours and (func.overloadpacket in _NOT_HELD or torch.Tag.inplace_view in func.tags):
        raise NotImplementedError(f"{func} changes the shape of a tensor on the fake device")
    if ours and func.overloadpacket not in _COPIES:
        _check(func, args, kwargs)
    if device is not None:
        ours = device.type == DEVICE.type
        generator = kwargs.get("generator")
        if ours and generator is not None and generator.device.type != DEVICE.type:
            raise MixedDevicesError(f"Expected a generator on {DEVICE} for {func}, found a CPU one")
        kwargs = {**kwargs, "device": torch.device("cpu")} if ours else kwargs
    held = tree.tree_map_only(_Tensor, lambda x: x.held, (args, kwargs))
    out = func(*held[0], **held[1])
    if not ours:
        return out
    written = _written(func, args, kwargs)
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return tree.tree_map_only(Tensor, _Tensor, out)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The operands that the operation writes to and returns."""
    if not any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return []
    return [v for a, v in _operands(func, args, kwargs) if a.alias_info and a.alias_info.is_write]


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Each argument of the schema that was given, with its value."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    packet = func.overloadpacket
    numbers = torch.Tag.pointwise in func.tags or packet in _VALUED
    for argument, value in _operands(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if packet in _INDEXED and argument.name == "indices":
            continue
        for x in tree.tree_leaves(value):
            if not isinstance(x, Tensor) or isinstance(x, _Tensor) or x.device.type == "meta":
                continue
            if x.dim() or writes or not numbers:
                raise MixedDevicesError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {DEVICE} and cpu! (argument {argument.name} of {func})"
                )
