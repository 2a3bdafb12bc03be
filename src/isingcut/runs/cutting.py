"""Stages `excise`, `patch` and `heal`: write and verify the checkpoint or GGUF file of a state.

The patch comes first: it folds a linear map, fitted on the calibration text, into the block before
each cut. If no layer can be patched, the exact cut is written and the reason reported.
Healing distils the original into the patched model; its options are checked before anything is
measured.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from isingcut.console.printing import say
from isingcut.console.progress import Progress
from isingcut.data.healing_text import is_mixed, to_fit
from isingcut.data.mixture import without_folders
from isingcut.errors import ArchitectureError, InputError
from isingcut.files import cuts, healings, ownership, results, writing
from isingcut.files.runs import BlockList
from isingcut.files.stages import find_product
from isingcut.formats.architectures.cuts import cut_config
from isingcut.formats.checkpoints import Checkpoint, count_mtp_layers
from isingcut.formats.cutting import gguf
from isingcut.formats.cutting.checkpoint import excise as write_cut
from isingcut.formats.gguf_files import read_gguf
from isingcut.formats.sources import find_gguf
from isingcut.healing import CUT
from isingcut.healing import RECORD as HEALING
from isingcut.healing.heal import build_text, heal_checkpoint, sample_length
from isingcut.healing.job import Job, check_training
from isingcut.healing.patch.files import StoredLayers, apply_patches
from isingcut.healing.repairs import registry
from isingcut.healing.repairs.base import (
    CANNOT,
    Repaired,
    before_training,
    make_patches,
    record_unpatched,
)
from isingcut.healing.work_folder import describe_options
from isingcut.measure.streams import Kept
from isingcut.models.load import (
    explain_unused,
    find_auto_class,
    find_unused,
    load_config,
)
from isingcut.models.sublayers import find_zeroed
from isingcut.models.verify import verify
from isingcut.options.config import (
    LENGTH,
    HealConfig,
    RunConfig,
    distil_config,
    heal_config,
)
from isingcut.report.card import card_parts, model_card
from isingcut.runs.folder import RunFolder, slug
from isingcut.runs.measuring import calibration_options, read_calibration
from isingcut.runs.prices import Prices
from isingcut.runs.session import Session
from isingcut.runs.solving import chosen_blocks, load_candidates, require
from isingcut.runs.stages import Estimate, Making, stage

HEALED = "healed"

# The outputs of one state.
_OF_STATE = ("model", "model.gguf")
# Maximum characters of a block list in a folder name; a longer list is replaced by a hash.
_LONGEST_NAME = 100
# Bytes per trained number (weight, gradient, two moments).
_TRAINED = 16


def output_folder(
    folder: RunFolder, config: RunConfig, removed: Sequence[int] | None
) -> Path:
    """Return the folder for the model of a state, by default the folder of its removal.

    A state given by its blocks gets its own folder if another state was cut or chosen in the folder
    of the removal and may not be replaced.

    Args:
        removed: the blocks given by `--blocks`; None is the chosen state.
    """
    target = folder.target(config)
    if removed is None or folder.overwrite:
        return target
    cut = [folder.find_record(target / name) for name in _OF_STATE]
    there = [record.options.removed or [] for record in cut if record is not None]
    ranked = target / "candidates.json"
    if not there and ranked.exists():
        there = [folder.load(ranked, load_candidates).chosen.removed]
    if all(sorted(blocks) == sorted(removed) for blocks in there):
        return target
    named = "-".join(map(str, sorted(removed)))
    if len(named) > _LONGEST_NAME:
        named = results.fingerprint({"removed": sorted(removed)})[:16]
    return folder.path / f"remove-{slug(config.removal)}-blocks-{named}"


def product(
    folder: RunFolder, config: RunConfig, removed: Sequence[int] | None = None
) -> Path:
    """Return the run's final checkpoint: the healed one if the run heals, else `model/`.

    Args:
        removed: the blocks of another state than the chosen one.

    Raises:
        InputError: no checkpoint without these blocks was cut.
        StageFileError: there is no `model/` yet; the message has the next command.
    """
    place = target = folder.target(config)
    if removed is None:
        require(folder, config, "model")
    else:
        place = _place_without(folder, config, removed)
    if place == target and config.heal and not folder.find_finished(target / HEALED):
        return target / HEALED
    return find_product(folder.run, folder.path, place)


def _place_without(
    folder: RunFolder, config: RunConfig, removed: Sequence[int]
) -> Path:
    """Find the checkpoint without these blocks, first in the folder for their number."""
    keys = [key for key in folder.run.stages if key.endswith("model")]
    others = ((folder.path / key).parent for key in keys)
    for place in (folder.target(config), *others):
        made = folder.find_record(place / "model")
        if made and made.done and sorted(made.options.removed or ()) == sorted(removed):
            return place
    named = ",".join(map(str, sorted(removed)))
    raise InputError(
        f"{folder.path} has no checkpoint without the blocks {named}; "
        f"type: isingcut excise {shlex.quote(str(folder.path))} --blocks {named}"
    )


def check_gguf(session: Session, folder: RunFolder, source: Path) -> None:
    """Check a GGUF file: complete, undamaged and of the run's model.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        InputError: the file is of another model, or does not exist.
    """
    header = read_gguf(source)
    header.check_blocks()
    # The run's own source file needs no comparison; another quantisation of it does.
    digest = ownership.file_sha256(source, session.progress)
    if folder.run.provenance.model.gguf_sha256 != digest:
        gguf.check_same_model(header, session.source)


def make_gguf(
    session: Session, folder: RunFolder, checkpoint: Path, source: Path | None = None
) -> Path | None:
    """Write `model.gguf` next to a checkpoint of the run: a GGUF file without the removed blocks.

    Tensors that the checkpoint has changed (patched, healed) get its values; the others keep their
    bytes.

    Args:
        source: the GGUF file; None: the run's own model.

    Returns:
        the file; None if the run's model is no GGUF file, or cannot be cut as one (reported on
        stderr).

    Raises:
        ArchitectureError: ``source`` cannot be cut, or stores a changed tensor differently.
    """
    original = source or find_gguf(session.config.model)
    if original is None:
        return None
    out = checkpoint.with_name("model.gguf")
    if source is None and folder.find_finished(out) and not folder.find_outdated(out):
        return out  # also if it was made from another GGUF file
    ownership.refuse_source(out, [original])
    try:
        return cut_gguf(session, folder, checkpoint, original)
    except ArchitectureError as e:
        if source is not None:
            raise
        say(f"isingcut: no GGUF file is written next to {checkpoint}: {e}")
        return None


@stage("gguf", Path)
def cut_gguf(
    session: Session, folder: RunFolder, checkpoint: Path, source: Path
) -> Making:
    config = session.config
    removed = folder.record(checkpoint.with_name("model")).options.removed or []
    options: dict[str, Any] = {
        "removed": removed,
        "model": folder.record(checkpoint).fingerprint,
        "source": ownership.file_sha256(source, session.progress),
    }
    packed = folder.run.blocks.packed if config.budget.packed else None
    if packed is not None:
        options["type"] = packed.type

    path = yield folder, checkpoint.with_name("model.gguf"), options
    header = read_gguf(source)
    original = session.source
    layers = session.stack.whole(removed)
    attention, mlps = session.stack.halved(removed)
    zeroed = find_zeroed(Checkpoint.read(original), session.loaded.model, removed)
    changed = gguf.changed_tensors(header, original, checkpoint, layers, zeroed)
    gguf.cut_gguf(
        source,
        layers,
        path,
        attention=attention,
        mlps=mlps,
        drop_mtp=config.drop_mtp,
        changed=changed,
        packed=options.get("type"),
        progress=session.progress,
    )


def _price_model(prices: Prices) -> list[Estimate]:
    """Estimate the exact cut, and its patch."""
    config = prices.config
    # A checkpoint is read, written, and read again to verify it.
    cut = prices.estimate(reads=3)
    if config.patch == "none":
        return [cut]
    trained = config.heal or prices.streamed
    name = before_training(config.patch) if trained else config.patch
    patch = prices.estimate(
        samples=-(-config.patch_tokens // config.length),
        tokens=registry.get(name).passes * config.patch_tokens,
        reads=prices.streamed,
        work=4 * config.patch_tokens * prices.stream,
    )
    return [cut, dataclasses.replace(patch, name="patch")]


@stage("cut", Path, price=_price_model)
def make_model(
    session: Session, folder: RunFolder, removed: Sequence[int] | None = None
) -> Making:
    """Write `model/` of one state, patched if the options say so, and verify it.

    Args:
        removed: the blocks of another state than the chosen one; see `output_folder`.
    """
    config = session.config
    blocks = list(removed) if removed is not None else chosen_blocks(folder, config)
    options = dict[str, Any](removed=blocks, named=removed is not None)
    if config.drop_mtp:
        options["drop_mtp"] = True
    if config.patch != "none":
        healing = _patch_config(config)
        how = {"tokens": healing.patch_tokens, "repair": healing.repair}
        how |= share_options(config)
        if config.heal:
            keys = ("text", "seed", "length", "report_samples")
            how["healing"] = {key: getattr(healing, key) for key in keys}
        options |= {"patch": how, **calibration_options(folder), **session.numerics}

    path = yield folder, output_folder(folder, config, removed) / "model", options
    session.choose_tuning(folder)
    write_model(session, folder, blocks, path, overwrite=True)


def write_model(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    out: Path,
    *,
    overwrite: bool,
) -> None:
    """Write and verify the patched checkpoint, or the exact cut if nothing can be patched.

    Raises:
        ArchitectureError: the state cannot be cut; nothing was fitted.
        OutputExistsError: ``out`` exists and ``overwrite`` is false.
        VerificationError: its logits differ from those of the original with the blocks skipped and
            the layers patched; nothing is left at ``out``.
    """
    config = session.config
    source = session.source
    loaded = session.loaded
    trust = config.trust_remote_code
    blocks = list(removed)
    layers = session.stack.whole(blocks)
    with writing.atomic_folder(
        out, overwrite=overwrite, sources=[source, *folder.sources]
    ) as temporary:
        temporary.rmdir()
        seen = Checkpoint.read(source)
        cut_config(seen.config, layers, drop_mtp=config.drop_mtp)
        unused = find_unused(seen, loaded.model)
        stored = StoredLayers(source, session.stack)
        patched = dict[str, Any]()
        if config.patch != "none":
            made = _make_patches(
                session, folder, blocks, session.progress, layers=stored
            )
            patched["patch"] = made.record
        write_cut(
            source,
            layers,
            temporary,
            drop_mtp=config.drop_mtp,
            unused=unused,
            zeroed=find_zeroed(seen, loaded.model, blocks),
            replaced=stored.replaced,
        )
        with apply_patches(loaded.replay, stored.patches):
            proof = verify(
                loaded.runnable,
                blocks,
                temporary,
                trust_remote_code=trust,
                progress=session.progress,
            )
        if unused:
            proof.remarks.append(explain_unused(unused))
        loads_with = find_auto_class(load_config(source, trust_remote_code=trust))
        parts = card_parts(
            folder.path, folder.target(config), blocks, loads_with.__name__
        )
        mtp = {"mtp": count_mtp_layers(seen), "drop_mtp": config.drop_mtp}
        record = cuts.CutRecord(
            removed=blocks,
            layers=layers if session.stack.split else None,
            of=len(session.stack),
            model=folder.run.provenance.model.content(),
            card=parts.model_copy(update={"proof": proof.inputs, **mtp, **patched}),
            proof=proof,
            **patched,
        )
        # Without folders, because the checkpoint may be shared.
        shared = without_folders(record.content())
        results.write_json(temporary / CUT, record.kind, shared)
        card = cuts.CardParts(**shared["card"])
        (temporary / "README.md").write_text(model_card(card), encoding="utf-8")


def _make_patches(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    progress: Progress,
    **given: Any,
) -> Repaired:
    """Make the patches of a state, as `make_patches`; none, with the reasons, if it cannot."""
    loaded = session.loaded
    own = read_calibration(folder)
    config = session.config
    later = None
    if config.heal:
        later = distil_config(config)
        later = later.replace(length=sample_length(later, loaded.model))
    share = config.patch_share
    tokens, text = to_fit(
        own, loaded.tokenizer, config.patch_tokens, loaded.model, later, share
    )
    how = _patch_config(config).replace(batch_tokens=session.batch_tokens)
    job = Job(
        loaded, tuple(removed), session.source, tokens, folder.path, how, progress
    )
    try:
        made = make_patches(job, **given)
    except CANNOT as e:
        return Repaired([], record_unpatched(removed, e))
    made.record.text = text
    return made


def _patch_config(config: RunConfig) -> HealConfig:
    """Return the healing options for the patch, which is made before the training by `--heal`."""
    registry.check(config.patch)
    patch = before_training(config.patch) if config.heal else config.patch
    return heal_config(config).replace(patch=patch)


def share_options(config: RunConfig) -> dict[str, Any]:
    """Return the option `patch_share` for a text that it affects; else nothing."""
    return {"patch_share": config.patch_share} if is_mixed(config.calibration) else {}


def fit_patch(
    session: Session,
    folder: RunFolder,
    removed: Sequence[int],
    progress: Progress,
    kept: Kept | None = None,
) -> dict[str, Tensor]:
    """Return the parameters that the patch of a state changes, by name; none if it cannot.

    Args:
        kept: as in `make_patches`.
    """
    if session.config.patch == "none" or not removed:
        return {}
    new = dict[str, Tensor]()
    for p in _make_patches(session, folder, removed, progress, kept=kept).patches:
        layer = f"{session.stack.blocks[p.block].path}.{p.path}"
        new |= {f"{layer}.{name}": value for name, value in p.parameters.items()}
    return new


def check_healing(session: Session, blocks: BlockList | None = None) -> None:
    """Check that healing is possible before anything is written."""
    config = session.config
    if not config.heal:
        return
    check_training(heal_config(config))
    if session.streaming:
        raise InputError(
            "a streamed model cannot be healed in the run, because training needs its weights in "
            "memory; heal the cut model with `isingcut heal` on a larger machine"
        )


def _price_healing(prices: Prices) -> list[Estimate]:
    """Estimate healing with a budget of time or tokens."""
    if not prices.config.heal:
        return []
    if prices.streamed:
        return [Estimate(impossible="needs the whole model in memory")]
    # A pass of the original, then forward and backward through the remaining blocks.
    passes = 1 + 3 * prices.left
    tokens = prices.config.heal.tokens or 0
    if seconds := prices.config.heal.seconds:
        tokens = seconds / passes / prices.forward
    if not tokens:
        why = "depends on the text; set a limit with --heal 10min"
        return [Estimate(impossible=why)]
    trained = _TRAINED * prices.left * prices.weights / prices.dtype.itemsize
    work = trained + prices.batch * prices.graph
    return [prices.estimate(int(tokens) // LENGTH, passes * tokens, work=work)]


@stage("heal", Path, check=check_healing, price=_price_healing)
def heal(session: Session, folder: RunFolder) -> Making:
    """Write `healed/`, distilled from `model/`."""
    config = session.config
    # The stage has checked the old output.
    healing = distil_config(config).replace(overwrite=True)
    target = folder.target(config)
    start = target / "model"
    made = folder.record(start)
    removed = tuple(made.options.removed or ())
    options = (
        describe_options(healing)
        | calibration_options(folder)
        | {"model": made.fingerprint, **session.numerics}
    )

    path = yield folder, target / HEALED, options
    if (target / HEALING).exists():
        # It is replaced at the end; refuse now a file that is not a record of a healing.
        results.read_document(target / HEALING, healings.HealingFile)
    # Text outside all splits of the run.
    used = read_calibration(folder)
    text = build_text(healing, session.loaded, used)
    job = Job(
        session.loaded, removed, start, text.train, path, healing, session.progress
    )
    heal_checkpoint(job, text, path)
    shutil.copyfile(path / HEALING, target / HEALING)
