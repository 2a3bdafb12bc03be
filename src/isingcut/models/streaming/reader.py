"""The stored tensors of one part, as the model wants them, in a buffer that is used again.

Plain file reads, not memory maps: what was mapped and read would stay in the process's resident
memory, and a buffer of the reader's own has a known size.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import CheckpointError
from isingcut.models.checkpoint.read import StoredTensor, read_checkpoint, read_config
from isingcut.models.fp8 import DTYPES, dequantise, fp8_layout, read_tensor, scale_of, tile_of
from isingcut.models.loading import refuse_infinite
from isingcut.models.parts import Part
from isingcut.models.streaming.plan import Copied, PartPlan, plan_parts

# Bytes that are converted at a time: small enough to stay in a cache, large enough to read well.
_STAGE = 4 * 2**20
_START = 64


class Reader:
    """Fills buffers with the parts of one checkpoint, one at a time.

    Args:
        folder: the checkpoint.
        model: its skeleton.
        blocks: paths of the block modules.
        dtype: the model's.

    Attributes:
        plans: what fills each part.
        unexpected: stored tensors that the model has no use for.
        bytes_read: from the files, so far.
    """

    def __init__(self, folder: Path, model: object, blocks: list[str], dtype: torch.dtype) -> None:
        raw = read_config(folder)
        self._folder = folder
        self._fp8 = fp8_layout(folder, raw) is not None
        self._tile = tile_of(raw)
        self._stored = read_checkpoint(folder)
        self._dtype = dtype
        self._files: dict[Path, FileIO] = {}
        self._stage = bytearray(_STAGE)
        self._lock = threading.Lock()
        self._checked: set[Part] = set()
        self.plans, self.unexpected = plan_parts(folder, model, blocks, dtype, fp8=self._fp8)
        self.bytes_read = 0

    def fill(self, part: Part, buffer: Tensor) -> dict[str, Tensor]:
        """Read one part. Its numbers are checked the first time.

        Args:
            buffer: (>= the part's size,) uint8 in host memory.

        Returns:
            views of the buffer, by every name that they have in the model.

        Raises:
            CheckpointError: a file became shorter, a dtype cannot be read, or a tensor holds NaN
                or infinity.
        """
        plan = self.plans[part]
        views = plan_views(plan, buffer)
        with torch.no_grad(), self._opened():
            for step in plan.steps:
                if isinstance(step, Copied):
                    self._copy(step.source, step.place(views[step.target]))
                    continue
                values = [self._value(source).to(step.dtype) for _, source in step.sources]
                for name, value in step.run(values).items():
                    if name in views:
                        views[name].copy_(value)
        if part not in self._checked:
            refuse_infinite(views.items(), self._folder)
            self._checked.add(part)
        return {name: views[target] for name, target in plan.names.items()}

    @cached_property
    def starts(self) -> str:
        """A hash of the first bytes of every stored tensor: it tells fine-tunes of a base apart."""
        digest = hashlib.sha256()
        data = memoryview(bytearray(_START))
        with self._opened():
            for tensor in self._stored.values():
                start = data[: min(_START, tensor.size)]
                self._read(tensor, 0, start)
                digest.update(f"{tensor.name}:{tensor.dtype}:{tensor.shape}:".encode() + start)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Files that are opened meanwhile are closed at the end."""
        # A measurement may ask for `starts` while a thread reads the next part.
        with self._lock:
            try:
                yield
            finally:
                while self._files:
                    self._files.popitem()[1].close()

    def _copy(self, source: StoredTensor, view: Tensor) -> None:
        if not view.numel():
            return
        if not view.is_contiguous():
            view.copy_(self._value(source))
        elif source.dtype.startswith("F8_"):
            self._dequantise(source, view)
        elif DTYPES.get(source.dtype) is view.dtype:
            plain: Any = view.view(-1).view(torch.uint8).numpy()
            self._read(source, 0, memoryview(plain))
        else:
            self._cast(source, view.view(-1))

    def _cast(self, source: StoredTensor, flat: Tensor) -> None:
        """Read and convert a few numbers at a time."""
        dtype = _torch_dtype(source)
        step = _STAGE // dtype.itemsize
        for first in range(0, len(flat), step):
            count = min(step, len(flat) - first)
            data = memoryview(self._stage)[: count * dtype.itemsize]
            self._read(source, first * dtype.itemsize, data)
            values = torch.frombuffer(data, dtype=dtype)
            flat[first : first + count].copy_(self._narrowed(source, values))

    def _narrowed(self, source: StoredTensor, values: Tensor) -> Tensor:
        """An FP8 checkpoint's other weights pass through the model's dtype first."""
        return values.to(self._dtype) if self._fp8 and source.dtype in ("BF16", "F16") else values

    def _dequantise(self, source: StoredTensor, view: Tensor) -> None:
        """A few rows (or experts) at a time, so that no float32 copy of a weight exists."""
        scale = self._tensor(scale_of(source.name, self._stored))
        dtype = _torch_dtype(source)
        width = source.size // source.shape[0]
        per = _rows_per_scale(scale, source.shape, self._tile)
        rows = max(1, _STAGE // (width * per)) * per if per else source.shape[0]
        for first in range(0, source.shape[0], rows):
            last = min(first + rows, source.shape[0])
            data = bytearray((last - first) * width)
            self._read(source, first * width, memoryview(data))
            piece = torch.frombuffer(data, dtype=dtype).view(last - first, *source.shape[1:])
            own = scale.ndim and scale.shape[0] > 1 and rows < source.shape[0]
            factor = scale[first // per : -(-last // per)] if own else scale
            view[first:last].copy_(dequantise(piece, factor, self._tile).to(self._dtype))

    def _value(self, source: StoredTensor) -> Tensor:
        """One stored tensor whole, as plain numbers."""
        value = self._tensor(source)
        if source.dtype.startswith("F8_"):
            scale = self._tensor(scale_of(source.name, self._stored))
            return dequantise(value, scale, self._tile).to(self._dtype)
        return self._narrowed(source, value)

    def _tensor(self, source: StoredTensor) -> Tensor:
        self.bytes_read += source.size
        return read_tensor(source)

    def _read(self, source: StoredTensor, first: int, data: memoryview) -> None:
        """Fill ``data`` with a tensor's bytes from ``first`` on."""
        file = self._files.get(source.file)
        if file is None:
            file = self._files[source.file] = FileIO(source.file)
        file.seek(source.start + first)
        done = 0
        while done < len(data):
            got = file.readinto(data[done:])
            if not got:
                raise CheckpointError(f"{source.file} ended early, inside {source.name!r}")
            done += got
        self.bytes_read += len(data)


def plan_views(plan: PartPlan, buffer: Tensor) -> dict[str, Tensor]:
    """The targets of a part as views of its buffer."""
    return {
        name: buffer[start : start + target.size].view(target.dtype).view(target.shape)
        for name, (target, start) in plan.targets.items()
    }


def _torch_dtype(source: StoredTensor) -> torch.dtype:
    if source.dtype not in DTYPES:
        raise CheckpointError(f"tensor {source.name!r} has the dtype {source.dtype}, not readable")
    return DTYPES[source.dtype]


def _rows_per_scale(scale: Tensor, shape: tuple[int, ...], tile: tuple[int, int] | None) -> int:
    """Rows (items of the first axis) that one row of the scale stands for; 0 if not certain."""
    if scale.numel() == 1 or scale.shape[0] in (1, shape[0]):
        return 1
    return tile[0] if tile is not None and len(shape) == 2 else 0
