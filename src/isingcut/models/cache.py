"""Where converted models are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from isingcut.inputs import user_path


def cache_folder() -> Path:
    """Where converted models are kept: `$ISINGCUT_CACHE`, else the platform's cache folder."""
    if override := os.environ.get("ISINGCUT_CACHE"):
        return user_path(override)
    home = Path.home()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif (home / "Library" / "Caches").is_dir():
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "isingcut"


def gguf_cache() -> Path:
    """Where converted GGUF files are kept, by the hash of the file.

    Folders of the name ``gguf`` are of versions that completed a file with random numbers.
    """
    return cache_folder() / "gguf-2"
