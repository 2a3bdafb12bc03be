"""Write a smaller checkpoint without some blocks: bytes copied, layers renamed, config cut.

No tensor is decoded and no model is loaded. So bf16, fp8 with its scales and packed int4 are copied
unchanged, with a few megabytes of memory. The result appears under its name only when it is
complete.
"""

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isingcut.data.mixture import without_folders
from isingcut.errors import CheckpointError
from isingcut.files.inputs import load_json
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures import cuts
from isingcut.formats.architectures.fields import DEPTH_SHAPED
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.checkpoints import Checkpoint, is_mtp
from isingcut.formats.safetensors_files import (
    NewTensor,
    StoredTensor,
    find_contained,
    write_checkpoint,
    write_object,
)

_QUANTISATION_FILES = (
    "hf_quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
)
# The names of lists of modules that are not quantised, by quantisation method.
_LISTS = {
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "modelopt": "exclude_modules",
}
_CONFIGS = {
    "config.json": "quantization_config",
    "hf_quant_config.json": "quantization",
}
# Files besides weights and configuration: tokenizer, chat template, custom code, licence, ...
_COPIED_SUFFIXES = {
    ".json",
    ".jinja",
    ".model",
    ".py",
    ".txt",
    ".tiktoken",
    ".yaml",
    ".yml",
}
_COPIED_NAMES = re.compile(
    r"^(license|licence|notice|use_policy|copying)", re.IGNORECASE
)
_NOT_COPIED = re.compile(
    r"(^\.|\.index\.json$|^config\.json$|^isingcut\.json$|^trainer_state\.json$|^training_args|^optimizer|^scheduler)"
)
_COPY_LIMIT = 256 * 2**20
# Keys of configurations in which other programs leave a path of their machine.
_PATH_KEYS = re.compile(r"_?name_or_path|.*_(file|path|dir)")


def excise(
    source: Path,
    removed: Removed,
    out: Path,
    *,
    drop_mtp: bool = False,
    unused: Collection[str] = (),
    replaced: Mapping[str, StoredTensor | None] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the checkpoint ``source`` without the blocks ``removed`` to the folder ``out``.

    Args:
        source: a Hugging Face folder with safetensors (one file, or shards with an index).
        removed: the state, as from `find_removed`.
        out: the new folder; it appears only when it is complete.
        drop_mtp: leave out the layers for multi-token prediction, which otherwise stay.
        unused: tensors to leave out, because the model does not use them.
        replaced: new tensors by their names in ``source``; None leaves one out.
        max_shard_bytes: upper size of one shard; a larger tensor gets a shard of its own.

    Raises:
        OutputExistsError: ``out`` exists.
        ArchitectureError: the configuration cannot be cut exactly, or the state is illegal.
        CheckpointError: the checkpoint is damaged or contradicts itself.
        InputError: ``out`` cannot be written, or lies inside ``source``.
    """
    whole = Checkpoint.read(source)
    new_config = cuts.cut_config(whole.config, removed.layers, drop_mtp=drop_mtp)
    heads = 0 if drop_mtp else whole.mtp_layers
    mapping = cuts.renumber_blocks(whole.depth, removed.layers, heads)
    tensors = _list_tensors(whole, mapping, drop_mtp=drop_mtp)
    tensors = [
        replace(t, zero=t.source.name in removed.zeroed)
        for t in tensors
        if t.source.name not in unused
    ]
    with atomic_folder(out, sources=[source]) as folder:
        _copy_companions(source, folder, mapping)
        write_object(folder / "config.json", new_config)
        remove_paths(folder)
        write_weights(folder, tensors, replaced or {}, max_shard_bytes)


def write_weights(
    folder: Path,
    tensors: Collection[NewTensor],
    replaced: Mapping[str, StoredTensor | None],
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the weights of a checkpoint, some of them replaced.

    A float8 layer that loses its scales is listed as not quantised.

    Args:
        folder: the checkpoint, with its configurations.
        tensors: all tensors.
        replaced: as in `excise`.
    """
    new = {t.name: replaced.get(t.source.name, t.source) for t in tensors}
    kept = [replace(t, source=own) for t in tensors if (own := new[t.name])]
    write_checkpoint(folder, kept, max_shard_bytes)
    plain = {name.rpartition(".")[0] for name in new if new[name] is None}
    if plain:
        list_plain(folder, sorted(plain))


def list_plain(folder: Path, modules: Sequence[str]) -> None:
    """Add modules to every list of a float8 checkpoint of modules that are not quantised."""
    for name, part in _CONFIGS.items():
        file = folder / name
        content = load_json(file, "the configuration") if file.is_file() else {}
        settings = content.get(part)
        if not isinstance(settings, dict):
            continue
        given = {
            name: settings[name]
            for name in _LISTS.values()
            if isinstance(settings.get(name), list)
        }
        # Without a list, loaders exclude the output head by default; with a list they do not.
        usual = _LISTS.get(str(settings.get("quant_method")), "exclude_modules")
        for key, listed in (given or {usual: ["lm_head"]}).items():
            settings[key] = [*listed, *modules]
        write_object(file, content)


def remove_paths(folder: Path) -> None:
    """Remove the folders of this machine from the configurations of a checkpoint."""
    for path in folder.glob("*config.json"):
        content = load_json(path, "the configuration", CheckpointError, infinite=True)
        cleaned = _without_paths(content)
        if cleaned != content:
            write_object(path, cleaned)


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        k: without_folders(v) if _PATH_KEYS.fullmatch(k) else _without_paths(v)
        for k, v in value.items()
    }


def _list_tensors(
    whole: Checkpoint, mapping: Mapping[int, int], *, drop_mtp: bool
) -> list[NewTensor]:
    """Return the tensors of the new checkpoint, in the source's order.

    Args:
        whole: the source.
        mapping: old block number to new, as from `cuts.renumber_blocks`.
        drop_mtp: leave out the layers for multi-token prediction.

    Raises:
        CheckpointError: the tensors have another number of blocks than the configuration.
    """
    count = whole.depth
    prefix = whole.prefix
    axes = DEPTH_SHAPED.get(str(whole.text.get("model_type")), {})
    kept = tuple(i for i in mapping if i < count)
    numbers = {str(old): new for old, new in mapping.items()}
    tensors = []
    for name, tensor in whole.stored.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            new = numbers.get(number)
            if new is not None:
                tensors.append(NewTensor(f"{prefix}{new}.{rest}", tensor))
        elif drop_mtp and is_mtp(name):
            continue
        elif ends := [end for end in axes if f".{name}".endswith(f".{end}")]:
            axis = axes[ends[0]]
            if tensor.shape[axis] % count:
                raise CheckpointError(
                    f"tensor {name!r} of shape {list(tensor.shape)} does not divide into {count} "
                    "blocks"
                )
            tensors.append(NewTensor(name, tensor, axis, count, kept))
        else:
            tensors.append(NewTensor(name, tensor))
    return tensors


def _copy_companions(source: Path, folder: Path, mapping: dict[int, int]) -> None:
    templates = source / "additional_chat_templates"
    nested = [] if templates.is_symlink() else sorted(templates.glob("*.jinja"))
    for path in [*sorted(source.iterdir()), *nested]:
        name = path.relative_to(source).as_posix()
        wanted = path.suffix in _COPIED_SUFFIXES or _COPIED_NAMES.match(name)
        if path.is_dir() or not wanted or _NOT_COPIED.search(name):
            continue
        real = find_contained(source, name)
        (folder / name).parent.mkdir(exist_ok=True)
        if name in _QUANTISATION_FILES:
            given = load_json(real, "the quantisation file", CheckpointError)
            write_object(folder / name, cuts.cut_quantisation(given, mapping))
        elif real.stat().st_size <= _COPY_LIMIT:
            shutil.copyfile(real, folder / name)
