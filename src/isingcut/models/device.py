"""Choose the device, dtype and memory limit of a model."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.printing import say
from isingcut.errors import InputError
from isingcut.files.provenance import cpu_name
from isingcut.formats.safetensors_files import read_checkpoint
from isingcut.options.parsed import Device, Memory
from isingcut.processes import is_launched, local_rank

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> torch.device:
    """Return the torch device of ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    ``"auto"`` is CUDA if there is a GPU, else the CPU. Other device names of torch (``"xpu"``) are
    accepted if torch finds the device. Of several names, the first one is used.

    Raises:
        InputError: the device is not on this machine, or has no float64.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name = Device(device).partition(",")[0]
    except InputError as e:
        raise InputError(f"--device: {e}") from e
    kind, _, number = name.partition(":")
    try:
        present = 1 if kind == "cpu" else torch.get_device_module(kind).device_count()
    except (RuntimeError, AttributeError):
        present = 0
    # The text is compared, because torch keeps only eight bits of the number.
    if int(number or 0) >= present:
        raise InputError(f"--device {name} is not on this machine; choose auto or cpu")
    if kind == "mps":
        raise InputError(
            "--device mps has no float64, which losses are summed in; choose cpu"
        )
    return torch.device(kind, int(number)) if number else torch.device(kind)


def pick_devices(
    device: str, size: int, limit: str = "", cards: int | None = None
) -> list[torch.device]:
    """Return the devices for the weights of a model.

    ``"cuda:0,cuda:1"`` names two devices. A GPU without a number means the fewest GPUs that
    together have room for the weights, or a single one if all together have too little.

    Args:
        device: as in `pick_device`.
        size: bytes of the weights.
        limit: memory limit of each device, as in `allowance`.
        cards: GPUs per process; None: one if a launcher started several processes, else any number.

    Raises:
        InputError: a device is not on this machine or is named twice, or ``cards`` does not fit.
    """
    import torch

    wanted = [pick_device(name) for name in device.split(",")]
    if len(set(wanted)) < len(wanted):
        raise InputError(f"--device {device} names a device twice")
    first = wanted[0]
    named = first.type == "cpu" or ":" in device
    if cards and named:
        raise InputError(
            f"--cards-per-process needs --device cuda or auto on GPUs; got {device}"
        )
    if named or (is_launched() and not cards):
        return wanted
    present = device_module(first).device_count()
    begin = first_card(present, cards) if cards else 0
    own = [torch.device(first.type, begin + i) for i in range(cards or present)]
    if begin + len(own) > present:
        raise InputError(
            f"--cards-per-process {cards}: this process needs {own[-1]}, but the machine has "
            f"{present} GPUs; start fewer processes"
        )
    if cards:
        return own
    room = 0
    for i, card in enumerate(own):
        room += allowance(limit, card).left
        if size <= room:
            return own[: i + 1] if i else wanted
    return wanted


def first_card(present: int, cards: int | None = None) -> int:
    """Return the number of this process's first GPU.

    A launcher may show each process only its own GPUs, as Slurm does for ``--gpus-per-task``. Then
    it is 0 in every process.

    Args:
        present: number of GPUs that this process sees.
        cards: GPUs per process.
    """
    each = cards or 1
    return 0 if present <= each else local_rank() * each


def device_module(device: torch.device) -> Any:
    """Return the counterpart of ``torch.cuda`` for a device; None for the CPU."""
    import torch

    return None if device.type == "cpu" else torch.get_device_module(device)


@dataclass
class BatchLimit:
    """The largest micro-batch that is known to fit a device.

    Attributes:
        tokens: largest number of tokens, unless a single sample has more.
    """

    device: torch.device
    tokens: int = sys.maxsize

    def release(self) -> None:
        """Free the memory of a failed or finished computation, also what allocators keep of it."""
        gc.collect()
        if module := device_module(self.device):
            module.empty_cache()
        # On a machine with glibc. It would keep most of what a training on a CPU has used.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def synchronise(*devices: torch.device) -> None:
    """Wait for devices to finish all work."""
    for device in devices:
        module = device_module(device)
        if module is not None:
            module.synchronize(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    ``"auto"`` is bfloat16 if the device computes fast in it: GPUs with compute capability 8 or
    higher, CPUs with AMX, and CPUs other than Intel's with AVX512-BF16. It is float16 for GPUs of
    compute capability 7, else float32.
    """
    import torch

    if dtype in ("float32", "bfloat16", "float16"):
        number: torch.dtype = getattr(torch, dtype)
        return number
    if dtype != "auto":
        raise InputError(
            f"--dtype must be auto, float32, bfloat16 or float16; got {dtype!r}"
        )
    fast: Any = False
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        if generation == 7:
            return torch.float16
        fast = generation >= 8
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()
        # An Intel Xeon whose AMX is hidden by a virtual machine is slower in bfloat16.
        fast = features.get("avx512_bf16") and "Intel" not in cpu_name()
        fast = fast or features.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: str, device: str) -> str:
    """Return the name of the dtype for the dtype and device of the options.

    It prints a warning if ``"auto"`` is float16, in which large numbers overflow.
    """
    name = str(pick_dtype(dtype, pick_device(device))).removeprefix("torch.")
    if dtype == "auto" and name == "float16":
        say(
            "isingcut: this GPU has no bfloat16, so the weights are float16, whose largest number "
            "is 65,504; if a loss is NaN, pass --dtype float32"
        )
    return name


# Share of the free memory, if no limit is given; the rest is for the system and estimation errors.
_SHARE = 0.8


@dataclass(frozen=True)
class Allowance:
    """The memory limit of a measurement, in bytes.

    Attributes:
        total: limit of the whole process on a CPU, of all allocations on a GPU.
        used: memory in use when this was computed.
    """

    total: int
    used: int

    @property
    def left(self) -> int:
        """Memory left for weights and hidden states, in bytes."""
        return max(0, self.total - self.used)


def allowance(limit: str, device: torch.device) -> Allowance:
    """Return the memory limit on a device.

    Args:
        limit: as ``"8GB"`` or ``"50%"`` of the free memory; empty takes 80 % of it. On CPUs, the
            processes that a launcher started on one machine divide a percentage equally.

    Raises:
        InputError: the limit cannot be parsed.
    """
    used, free = _used_and_free(device)
    allowed = Memory(limit)
    if allowed.amount is not None:
        return Allowance(int(allowed.amount), used)
    share = allowed.share or _SHARE
    if device.type == "cpu":
        share /= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Allowance(used + int(share * free), used)


def least_left(devices: Iterable[torch.device], limit: str = "") -> int:
    """Return the bytes left on the fullest of some devices; see `allowance`."""
    return min(allowance(limit, device).left for device in devices)


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint's weights once loaded in ``dtype``, from its headers."""
    total = 0
    for tensor in read_checkpoint(folder).values():
        if tensor.dtype == "U8" and tensor.name.endswith("_blocks"):
            # MXFP4: two weights per byte.
            total += 2 * tensor.size * dtype.itemsize
        elif tensor.dtype.startswith(("F", "BF")):
            total += math.prod(tensor.shape) * dtype.itemsize
        else:
            total += tensor.size
    return total


def _used_and_free(device: torch.device) -> tuple[int, int]:
    module = device_module(device)
    if module is not None:
        free, _ = module.mem_get_info(device)
        used = module.memory_allocated(device)
        return used, int(free) + module.memory_reserved(device) - used
    import psutil

    own = int(psutil.Process(os.getpid()).memory_info().rss)
    return own, min(int(psutil.virtual_memory().available), container_room())


def container_room(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that a container's control group still allows; without one, 2^62."""
    try:
        most = (root / "memory.max").read_text(encoding="ascii").strip()
        now = int((root / "memory.current").read_text(encoding="ascii"))
        lines = (root / "memory.stat").read_text(encoding="ascii").splitlines()
        # Cached file pages count as usage, but are released if memory is needed.
        cached = int(dict(map(str.split, lines)).get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62
    if not most.isdigit():
        return 1 << 62
    return max(0, int(most) - now + cached)
