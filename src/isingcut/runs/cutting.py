"""Stage `excise`: the checkpoint, or the GGUF file, of one state, proven before it is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.files.inputs import regular_file
from isingcut.files.outputs import file_sha256, refuse_source
from isingcut.files.writing import atomic_folder, clear_os_errors, fingerprint, read_json
from isingcut.healing.patch.files import RECORD
from isingcut.models.architectures.auto import loading_class_of
from isingcut.models.checkpoint.gguf_header import read_gguf
from isingcut.models.cutting.checkpoint import excise as write_cut
from isingcut.models.cutting.gguf import cut_gguf
from isingcut.models.cutting.gguf_patch import (
    Changed,
    Repacked,
    changed_tensors,
    check_same_model,
    repacked,
)
from isingcut.models.cutting.verify import verify, verify_streamed
from isingcut.options.config import RunConfig
from isingcut.report.card import card_parts, model_card
from isingcut.runs.folder import RunFolder
from isingcut.runs.healing_options import HEALED
from isingcut.runs.manifest import slug
from isingcut.runs.session import Session
from isingcut.runs.solving import chosen_blocks, load_candidates

CUT = "cut"
"""The folder of the exact cut, where `model/` is the patched one."""

# What is made of one state.
_OF_STATE = ("model", CUT, "model.gguf")
# Of a list of blocks in the name of a folder; a hash stands for more.
_LONGEST_NAME = 100


def place_of(folder: RunFolder, config: RunConfig, removed: Sequence[int] | None) -> Path:
    """Where the model of a state is written: with the other files of its removal.

    A state that is named by its blocks shares that folder with no other: where another one was
    cut, or chosen to be, and may not be replaced, it has a folder of its own.

    Args:
        removed: the blocks that were named; None is the chosen state.
    """
    target = folder.target(config.removal)
    if removed is None or folder.overwrite:
        return target
    stages = folder.manifest["stages"]
    cut = (stages.get(str((target / name).relative_to(folder.path))) for name in _OF_STATE)
    there = [record["options"]["removed"] for record in cut if record is not None]
    ranked = target / "candidates.json"
    if not there and ranked.exists():
        there = [folder.load(ranked, load_candidates)["chosen"]["removed"]]
    if all(sorted(blocks) == sorted(removed) for blocks in there):
        return target
    return _own_place(folder, config, removed)


def _own_place(folder: RunFolder, config: RunConfig, removed: Sequence[int]) -> Path:
    named = "-".join(map(str, sorted(removed)))
    if len(named) > _LONGEST_NAME:
        named = fingerprint({"removed": sorted(removed)})[:16]
    return folder.path / f"remove-{slug(config.removal)}-blocks-{named}"


def product(folder: RunFolder, config: RunConfig, removed: Sequence[int] | None = None) -> Path:
    """The run's final checkpoint: the distilled one where the run heals, else `model/`.

    Args:
        removed: of the state without these blocks, instead of the chosen one.

    Raises:
        InputError: no checkpoint without these blocks was cut.
    """
    target = folder.target(config.removal)
    place = target if removed is None else _place_without(folder, config, removed)
    # An older isingcut wrote the patched model there too.
    healed = config.heal or folder.finished(target / HEALED) is not None
    return place / (HEALED if healed and place == target else "model")


def _place_without(folder: RunFolder, config: RunConfig, removed: Sequence[int]) -> Path:
    """Where the checkpoint without these blocks is, of the folders that it can have."""
    for place in (folder.target(config.removal), _own_place(folder, config, removed)):
        made = folder.manifest["stages"].get(str((place / "model").relative_to(folder.path)))
        if made and made["done"] and sorted(made["options"]["removed"]) == sorted(removed):
            return place
    named = ",".join(map(str, sorted(removed)))
    raise InputError(
        f"{folder.path} has no checkpoint without the blocks {named}; "
        f"type: isingcut excise {folder.path} --blocks {named}"
    )


def excise(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int] | None = None,
    *,
    name: str = "model",
) -> Path:
    """Stage `excise`: the exact cut, verified against the original with the same blocks skipped.

    Args:
        removed: these blocks instead of the chosen ones; see `place_of` for where they go.
        name: of its folder there.
    """
    blocks = list(removed) if removed is not None else chosen_blocks(folder, session.config)
    options = {"removed": blocks}

    def make(path: Path) -> None:
        write_checkpoint(session, folder, blocks, path, overwrite=True)

    file = place_of(folder, session.config, removed) / name
    return folder.stage("excise", file, options, make, lambda path: path)


def write_checkpoint(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
) -> None:
    """The checkpoint without the blocks ``removed``, with its model card, verified, at ``out``.

    Raises:
        OutputExistsError: ``out`` is there and ``overwrite`` is false.
        VerificationError: it does not compute what it should; nothing is left at ``out``.
    """
    blocks = list(removed)
    trust = session.config.trust_remote_code
    loads_with = loading_class_of(session.source, trust_remote_code=trust)
    target = folder.target(session.config.removal)
    parts = card_parts(folder.path, target, blocks, loads_with)
    sources = [session.source, *folder.sources]
    with atomic_folder(out, overwrite=overwrite, sources=sources) as temporary:
        temporary.rmdir()
        write_cut(session.source, blocks, temporary)
        if session.streaming:
            proof = verify_streamed(session.streamed[1], blocks, temporary, trust_remote_code=trust)
        else:
            proof = verify(session.loaded.model, blocks, temporary, trust_remote_code=trust)
        parts["proof"] = proof.inputs
        record = {
            "format": "isingcut-removal",
            "version": 1,
            "removed": blocks,
            "of": len(session.stack),
            "model": folder.manifest["provenance"]["model"],
            "card": parts,
            "proof": proof.record,
        }
        with clear_os_errors(out):
            (temporary / "README.md").write_text(model_card(parts), encoding="utf-8")
            text = json.dumps(record, indent=1) + "\n"
            (temporary / "isingcut.json").write_text(text, encoding="utf-8")


def check_gguf(session: Session, folder: RunFolder, source: Path) -> None:
    """Refuse a GGUF file that is damaged, lacks tensors, or is of another model than the run.

    Raises:
        CheckpointError: damaged or incomplete.
        InputError: of another model, or not there.
    """
    header = read_gguf(source)
    header.check_blocks()
    # The file that the run was made from needs no comparison; another packing of it does.
    if folder.manifest["provenance"]["model"].get("gguf_sha256") != file_sha256(source):
        check_same_model(header, session.source)


def excise_gguf(
    session: Session, folder: RunFolder, source: Path, removed: Sequence[int] | None = None
) -> tuple[Path, list[Repacked]]:
    """`model.gguf`: the same blocks cut out of a GGUF file, its tensors' bytes untouched but those
    of the layers that are patched in `model/`.

    Returns:
        the file, and how near the patched tensors are to those of `model/`.

    Raises:
        ArchitectureError: it cannot be cut, or the file has no tensor for a patched layer.
    """
    regular_file(source, "the GGUF file")
    config = session.config
    blocks = list(removed) if removed is not None else chosen_blocks(folder, config)
    place = place_of(folder, config, removed)
    patch = read_json(place / "model" / RECORD, "removal").get("patch") or {}
    cuts = [*patch.get("cuts", []), *(patch.get("tuning") or {}).get("layers", [])]
    options: dict[str, Any] = {"removed": blocks, "source": file_sha256(source)}
    changed: dict[str, Changed] = {}
    if cuts:
        options["patch"] = fingerprint(cuts)
        layers = list(dict.fromkeys((cut["block"], cut["layer"]) for cut in cuts))
        header = read_gguf(source)
        changed = changed_tensors(header, session.source, place / "model", blocks, layers)

    def make(path: Path) -> None:
        cut_gguf(source, blocks, path, overwrite=True, changed=changed)

    refuse_source(place / "model.gguf", [source])
    file = folder.stage("excise", place / "model.gguf", options, make, lambda path: path)
    return file, repacked(source, file, changed, blocks) if changed else []
