"""`python -m isingcut.evaluation.measure_process FOLDER DTYPE DEVICE TOKENS TRUST`: peak memory.

A process of its own, because a peak never goes down again: loads the checkpoint, runs one
prefill and a short decode, and prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from isingcut.data.generation import decode_tokens
from isingcut.models.architectures.blocks import text_model
from isingcut.models.device import device_module
from isingcut.models.load import load


def main(arguments: list[str]) -> None:
    """Measure and print ``{"peak_memory_bytes": ...}``."""
    folder, dtype, device, tokens, trust = arguments
    loaded = load(Path(folder), dtype=dtype, device=device, trust_remote_code=trust == "1")
    prompt = torch.full((1, int(tokens)), 1, dtype=torch.int64, device=loaded.device)
    decode_tokens(text_model(loaded.model), prompt, 4)
    module = device_module(loaded.device)
    peak = resident_peak() if module is None else module.max_memory_allocated(loaded.device)
    print(json.dumps({"peak_memory_bytes": peak}))


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss, this does not start from the parent's peak.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
