"""Provenance of a result: versions, machine, and the paths of its sources on this machine."""

import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from isingcut.files.inputs import user_path

__version__ = "0.1.0"


def model_path(folder: Path, name: str) -> dict[str, Any]:
    """Return the path of a local model, for a run folder that is moved or opened elsewhere."""
    model = user_path(name)
    if not model.exists():
        return {}
    absolute = model.resolve()
    relative = os.path.relpath(absolute, folder.resolve())
    return {"model_path": {"absolute": str(absolute), "relative": relative}}


def versions() -> dict[str, Any]:
    """Return versions and platform, for the provenance of results."""
    # Imported here because `--help` does not need it.
    from importlib.metadata import version

    packages = ("torch", "transformers", "numpy", "safetensors", "numba", "dimod")
    return {
        "isingcut": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command_line() -> str:
    """Return the command line of this process, which can be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or "unknown"
