"""How much memory there is, how much may be used, and what a model's weights take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isingcut.models.checkpoint.read import read_checkpoint
from isingcut.models.device import device_module
from isingcut.options.spellings import Memory

if TYPE_CHECKING:
    import torch

# Of the free memory, when no limit is given: the rest is for the system and for estimates' errors.
_SHARE = 0.8


@dataclass(frozen=True)
class Allowance:
    """Memory that a measurement may take, in bytes.

    Attributes:
        total: of the whole process on a CPU, of all allocations on a GPU.
        used: what was taken already when this was asked.
    """

    total: int
    used: int

    @property
    def left(self) -> int:
        """What weights and hidden states may still take."""
        return max(0, self.total - self.used)


def allowance(limit: str, device: torch.device) -> Allowance:
    """The memory allowed on a device.

    Args:
        limit: as ``"8GB"`` or ``"50%"`` (of what is free); empty takes 80 % of what is free.
            Processes that a launcher started on one machine have equal parts of a share.

    Raises:
        InputError: the limit cannot be read.
    """
    used, free = _used_and_free(device)
    allowed = Memory(limit)
    if allowed.amount is not None:
        return Allowance(int(allowed.amount), used)
    share = allowed.share or _SHARE
    if device.type == "cpu":
        share /= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Allowance(used + int(share * free), used)


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights once loaded in ``dtype``, from its headers."""
    total = 0
    for tensor in read_checkpoint(folder).values():
        if tensor.dtype == "U8" and tensor.name.endswith("_blocks"):
            # MXFP4: two numbers a byte.
            total += 2 * tensor.size * dtype.itemsize
        elif tensor.dtype.startswith(("F", "BF")):
            count = 1
            for side in tensor.shape:
                count *= side
            total += count * dtype.itemsize
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
    """Bytes a container's control group still allows; a huge number outside of any."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (root / limit).read_text(encoding="ascii").strip()
            now = int((root / usage).read_text(encoding="ascii"))
            stat = (root / limit).with_name("memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        if most.isdigit():
            # Cached file pages count as usage, but are given up when memory is wanted.
            cached = [int(x.split()[1]) for x in stat.splitlines() if x.startswith("inactive_file")]
            return max(0, int(most) - now + sum(cached))
    return 1 << 62
