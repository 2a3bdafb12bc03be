"""Stages `excise`, `patch` and `heal`: write and verify the checkpoint or GGUF file of a state.

The patch comes first: it folds a linear map, fitted on the calibration text, into the block before
each cut. If no layer can be patched, the exact cut is written and the reason reported.
Healing distils the original into the patched model; its options are checked before anything is
measured.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from isingcut.console.printing import say
from isingcut.console.progress import Progress
from isingcut.data.calibration import Calibration
from isingcut.data.healing_text import to_fit
from isingcut.data.mixture import without_folders
from isingcut.errors import ArchitectureError, InputError
from isingcut.files import cuts, ownership, results, writing
from isingcut.files.runs import BlockList
from isingcut.files.store import Store, slug
from isingcut.formats.architectures.cuts import cut_config
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.checkpoints import Checkpoint, count_mtp_layers
from isingcut.formats.cutting import gguf
from isingcut.formats.cutting.checkpoint import excise as write_cut
from isingcut.formats.gguf_files import read_gguf
from isingcut.formats.sources import find_gguf
from isingcut.healing import CUT
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
from isingcut.models.sublayers import find_removed
from isingcut.models.verify import verify
from isingcut.options.heal import LENGTH, HealConfig, HealingOptions
from isingcut.options.patch import PatchOptions
from isingcut.options.search import SearchOptions
from isingcut.report.card import card_parts, model_card
from isingcut.report.run_files import RunFiles
from isingcut.runs.context import Context
from isingcut.runs.prices import Prices
from isingcut.runs.solving import chosen_blocks, load_candidates, require
from isingcut.runs.stages import Estimate, Inputs, Planned, Runner, stage

HEALED = "healed"

# The outputs of one state.
_OF_STATE = ("model", "model.gguf")
# Maximum characters of a block list in a folder name; a longer list is replaced by a hash.
_LONGEST_NAME = 100
# Bytes per trained number (weight, gradient, two moments).
_TRAINED = 16


def output_folder(
    folder: Store, config: SearchOptions, removed: Sequence[int] | None
) -> Path:
    """Return the folder for the model of a state, by default the folder of its removal.

    A state given by its blocks gets its own folder if another state was cut or chosen in the folder
    of the removal and may not be replaced.

    Args:
        removed: the blocks given by `--blocks`; None is the chosen state.
    """
    target = folder.target(config.removal)
    if removed is None or folder.overwrite:
        return target
    cut = [folder.find_record(target / name) for name in _OF_STATE]
    there = [record.options.removed or [] for record in cut if record is not None]
    ranked = target / "candidates.json"
    if not there and ranked.exists():
        there = [folder.load(ranked, load_candidates).chosen.removed]
    wanted = sorted(removed)
    if all(blocks == wanted for blocks in there):
        return target
    named = "-".join(map(str, wanted))
    if len(named) > _LONGEST_NAME:
        named = results.fingerprint({"removed": wanted})[:16]
    return folder.path / f"remove-{slug(config.removal)}-blocks-{named}"


def product(folder: Store, config: Any, removed: Sequence[int] | None = None) -> Path:
    """Return the run's final checkpoint: the healed one if the run heals, else `model/`.

    Args:
        removed: the blocks of another state than the chosen one.

    Raises:
        InputError: no checkpoint without these blocks was cut.
        StageFileError: there is no `model/` yet; the message has the next command.
    """
    place = target = folder.target(config.removal)
    if removed is None:
        require(folder, config, "model")
    else:
        place = _place_without(folder, config, removed)
    if place == target and config.heal and not folder.find_finished(target / HEALED):
        return target / HEALED
    return folder.find_product(place)


def _place_without(
    folder: Store, config: SearchOptions, removed: Sequence[int]
) -> Path:
    """Find the checkpoint without these blocks, first in the folder for their number."""
    keys = [key for key in folder.run.stages if key.endswith("model")]
    others = ((folder.path / key).parent for key in keys)
    for place in (folder.target(config.removal), *others):
        made = folder.find_record(place / "model")
        if made and made.done and made.options.removed == sorted(removed):
            return place
    named = ",".join(map(str, sorted(removed)))
    raise InputError(
        f"{folder.path} has no checkpoint without the blocks {named}; "
        f"type: isingcut excise {shlex.quote(str(folder.path))} --blocks {named}"
    )


def check_gguf(context: Context, folder: Store, source: Path) -> None:
    """Check a GGUF file: complete, undamaged and of the run's model.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        InputError: the file is of another model, or does not exist.
    """
    header = read_gguf(source)
    header.check_blocks()
    # The run's own source file needs no comparison; another quantisation of it does.
    digest = ownership.file_sha256(source, context.progress)
    if folder.run.provenance.model.gguf_sha256 != digest:
        gguf.check_same_model(header, context.source)


def make_gguf(
    runner: Runner, config: PatchOptions, checkpoint: Path, source: Path | None = None
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
    folder = runner.folder
    original = source or find_gguf(runner.context.options.model)
    if original is None:
        return None
    out = checkpoint.with_name("model.gguf")
    if source is None and folder.find_finished(out) and not folder.find_outdated(out):
        return out  # also if it was made from another GGUF file
    ownership.refuse_source(out, [original])
    try:
        return cut_gguf(runner, config, out, original)
    except ArchitectureError as e:
        if source is not None:
            raise
        say(f"isingcut: no GGUF file is written next to {checkpoint}: {e}")
        return None


def _plan_gguf(runner: Runner, config: Any, out: Path, source: Path) -> Planned:
    folder = runner.folder
    packed = folder.run.blocks.packed if config.budget.packed else None
    return Planned(
        out,
        {
            "removed": folder.record(out.with_name("model")).options.removed or [],
            "source": ownership.file_sha256(source, runner.context.progress),
            "type": packed and packed.type,
            "original": source,
        },
    )


@stage("gguf", Path, plan=_plan_gguf)
def cut_gguf(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    source = context.source
    header = read_gguf(options.original)
    removed = find_removed(
        Checkpoint.read(source), context.loaded.model, options.removed
    )
    checkpoint = inputs.find("product")
    gguf.cut_gguf(
        options.original,
        removed,
        out,
        drop_mtp=options.drop_mtp,
        changed=gguf.changed_tensors(header, source, checkpoint, removed),
        packed=options.type,
        progress=context.progress,
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


def plan_patch(config: HealingOptions) -> dict[str, Any]:
    """Return what a patch is made from beside the calibration: the repair, and the text that a
    healing reports on, which the patch must not see."""
    registry.check(config.patch)
    found: dict[str, Any] = {"repair": config.patch, "unseen": None, "training": None}
    if config.heal and config.patch != "none":
        training = found["training"] = config.training()
        found["repair"] = before_training(config.patch)
        keys = ("text", "seed", "length", "report_samples")
        found["unseen"] = {key: getattr(training, key) for key in keys}
    return found


def _plan_model(
    runner: Runner, config: Any, removed: Sequence[int] | None = None
) -> Planned:
    folder = runner.folder
    blocks = list(removed) if removed is not None else chosen_blocks(folder, config)
    file = output_folder(folder, config, removed) / "model"
    values = {
        "removed": blocks,
        "named": removed is not None,
        **plan_patch(config),
        "target": folder.target(config.removal),
    }
    return Planned(file, values)


@stage("cut", Path, plan=_plan_model, price=_price_model)
def make_model(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    """Write `model/` of one state, patched if anything can be, and verify it.

    Raises:
        ArchitectureError: the state cannot be cut; nothing was fitted.
        VerificationError: its logits differ from those of the original with the blocks skipped and
            the layers patched; nothing is left at ``out``.
    """
    fit = None
    if options.repair != "none":
        fit = Fit.of(context, inputs.read("calibration", Calibration.load), options)
    drop_mtp: bool = options.drop_mtp
    files = RunFiles(inputs.folder, options.target)
    source = context.source
    loaded = context.loaded
    trust = context.options.trust_remote_code
    with writing.atomic_folder(out, overwrite=True, sources=[source]) as temporary:
        temporary.rmdir()
        seen = Checkpoint.read(source)
        removed = find_removed(seen, loaded.model, options.removed)
        cut_config(seen.config, removed.layers, drop_mtp=drop_mtp)
        unused = find_unused(seen, loaded.model)
        stored = StoredLayers(source, loaded.stack)
        patched = dict[str, Any]()
        if fit is not None:
            patched["patch"] = _make_patches(
                fit, removed, context.progress, stored
            ).record
        write_cut(
            source,
            removed,
            temporary,
            drop_mtp=drop_mtp,
            unused=unused,
            replaced=stored.replaced,
        )
        with apply_patches(loaded.replay, stored.patches):
            proof = verify(
                loaded.runnable,
                removed,
                temporary,
                trust_remote_code=trust,
                progress=context.progress,
            )
        if unused:
            proof.remarks.append(explain_unused(unused))
        loads_with = find_auto_class(load_config(source, trust_remote_code=trust))
        parts = card_parts(files, removed.blocks, loads_with.__name__)
        mtp = {"mtp": count_mtp_layers(seen), "drop_mtp": drop_mtp}
        record = cuts.CutRecord(
            removed=list(removed.blocks),
            layers=list(removed.layers) if loaded.stack.split else None,
            of=len(loaded.stack),
            model=files.run.provenance.model.content(),
            card=parts.model_copy(update={"proof": proof.inputs, **mtp, **patched}),
            proof=proof,
            **patched,
        )
        # Without folders, because the checkpoint may be shared.
        shared = without_folders(record.content())
        results.write_json(temporary / CUT, record.kind, shared)
        card = cuts.CardParts(**shared["card"])
        (temporary / "README.md").write_text(model_card(card), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Fit:
    """What patches are fitted with.

    Attributes:
        repair: the name of the repair.
        tokens: tokens to fit on.
        share: the share of the default text among them, see `PatchOptions.patch_share`.
        training: the healing that follows; its report text stays unseen.
    """

    context: Context
    calibration: Calibration
    repair: str = "linear"
    tokens: int = 0
    share: float = 0.0
    training: HealConfig | None = None

    @classmethod
    def of(cls, context: Context, calibration: Calibration, options: Any) -> Fit:
        """Return the fit of a stage's options, see `plan_patch`."""
        share = options.patch_share
        how = (options.repair, options.patch_tokens, share, options.training)
        return cls(context, calibration, *how)


def _make_patches(
    fit: Fit,
    removed: Removed,
    progress: Progress,
    layers: StoredLayers | None = None,
    kept: Kept | None = None,
) -> Repaired:
    """Make the patches of a state, as `make_patches`; none, with the reasons, if it cannot."""
    context = fit.context
    loaded = context.loaded
    later = fit.training
    if later is not None:
        later = later.replace(length=sample_length(later, loaded.model))
    sampler = loaded.sampler(0, 0, tokens=fit.tokens, progress=progress)
    tokens, text = to_fit(fit.calibration, sampler, fit.tokens, later, fit.share)
    how = HealConfig(
        patch=fit.repair, patch_tokens=fit.tokens, batch_tokens=context.batch_tokens
    )
    source = context.source
    job = Job(loaded, removed, source, tokens, source, how, progress)
    try:
        made = make_patches(job, layers, kept)
    except CANNOT as e:
        return Repaired([], record_unpatched(removed.blocks, e))
    made.record.text = text
    return made


def fit_patch(
    fit: Fit, blocks: Sequence[int], progress: Progress, kept: Kept | None = None
) -> dict[str, Tensor]:
    """Return the parameters that the patch of a state changes, by name; none if it cannot.

    Args:
        kept: as in `make_patches`.
    """
    if fit.repair == "none" or not blocks:
        return {}
    new = dict[str, Tensor]()
    stack = fit.context.stack
    for p in _make_patches(fit, stack.remove(blocks), progress, kept=kept).patches:
        layer = f"{stack.blocks[p.block].path}.{p.path}"
        new |= {f"{layer}.{name}": value for name, value in p.parameters.items()}
    return new


def check_healing(
    context: Context, config: HealingOptions, blocks: BlockList | None = None
) -> None:
    """Check that healing is possible before anything is written."""
    if not config.heal:
        return
    check_training(config.training())
    if context.streaming:
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


def _plan_healing(runner: Runner, config: Any) -> Planned:
    training = config.training()
    file = runner.folder.target(config.removal) / HEALED
    return Planned(file, {"training": describe_options(training), "healing": training})


@stage("heal", Path, plan=_plan_healing, check=check_healing, price=_price_healing)
def heal(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    """Write `healed/`, distilled from `model/`."""
    # The stage has checked the old output.
    healing = options.healing.replace(overwrite=True)
    start = inputs.find("model")
    blocks = results.read_document(start / CUT, cuts.CutRecord).removed
    removed = context.stack.remove(blocks)
    # Text outside all splits of the run.
    used = inputs.read("calibration", Calibration.load)
    text = build_text(healing, context.loaded, used, progress=context.progress)
    job = Job(
        context.loaded, removed, start, text.train, out, healing, context.progress
    )
    heal_checkpoint(job, text, out)
