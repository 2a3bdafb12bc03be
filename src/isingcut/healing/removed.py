"""Find the removed blocks of a cut checkpoint, from its record or from its weights.

A record is checked: the original by its hash, and the kept blocks by their shapes. Cut and original
must always have the same vocabulary, width and tokenizer. The weights alone suffice for checkpoints
of other tools (mergekit's passthrough, PruneMe, custom code), because kept blocks are bitwise
equal.
"""

import string
from pathlib import Path

import torch
from torch import nn

from isingcut.data.tokens import Encoder
from isingcut.errors import InputError
from isingcut.formats.architectures.blocks import stack_modules
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.sources import list_differences, model_identity
from isingcut.healing import CUT
from isingcut.healing.checks import RemovalRecord, original_of
from isingcut.models.load import LoadedModel, load, load_tokenizer
from isingcut.options.heal import HealConfig

_PROBE = string.printable + "The old mill stood by the river. naïve 東京 😀"


def check_pair(
    config: HealConfig, student: Path, removal: RemovalRecord | None, teacher: Path
) -> None:
    """Check that student and teacher belong together, without loading their weights.

    Args:
        student, teacher: folders.
        removal: the student's record, or None.

    Raises:
        InputError: the teacher is not the recorded model, vocabulary, width or tokenizer differ,
            the record does not fit the checkpoint, or the options do not fit the model.
    """
    ours, theirs = map(Checkpoint.read, (student, teacher))
    if removal is not None:
        if (wanted := original_of(removal)) and not config.other_teacher:
            given = model_identity(teacher)
            packed = given.get("gguf_sha256")
            changed = list_differences(wanted, given)
            if changed and (packed is None or wanted.get("gguf_sha256") != packed):
                raise InputError(
                    f"{student} was cut from {wanted['name']}, but the teacher {config.teacher} is "
                    f"another model (different: {changed}); give the original as --teacher, or add "
                    "--other-teacher if it replaces it (a quantised copy, for example)"
                )
        _check_cut(ours, removal, config.teacher, theirs)
    for name, words in {"vocab_size": "vocabulary", "hidden_size": "width"}.items():
        mine = ours.text.get(name)
        other = theirs.text.get(name)
        if mine != other:
            raise InputError(
                f"{student} has a {words} of {mine}, but the teacher {config.teacher} has {other}; "
                "give the original of the cut model"
            )
    trust = config.trust_remote_code
    first, second = (
        Encoder(load_tokenizer(folder, trust_remote_code=trust))(_PROBE)
        for folder in (student, teacher)
    )
    if first != second:
        raise InputError(
            f"{student} and the teacher {config.teacher} have different tokenizers; copy the "
            "original's tokenizer files into the cut model's folder"
        )


def _check_cut(
    student: Checkpoint, removal: RemovalRecord, name: str, teacher: Checkpoint
) -> None:
    """Check a checkpoint against its record, without loading it.

    Its number of blocks must fit, and its tensors must have the shapes of the original's.

    Raises:
        InputError: the checkpoint does not fit its record, or the teacher has another depth.
    """
    folder = student.folder
    ours = student.by_block()
    theirs = teacher.by_block()
    removed = removal.removed if removal.layers is None else removal.layers
    if removal.layers is None and removal.of != len(theirs):
        raise InputError(
            f"{folder} was cut from a model of {removal.of} blocks, but the teacher {name} has "
            f"{len(theirs)}; give the original of the cut model"
        )
    kept = [i for i in range(len(theirs)) if i not in set(removed)]
    if len(ours) != len(kept):
        raise InputError(
            f"{folder} has {len(ours)} blocks, but its record says that {len(removed)} "
            f"of {len(theirs)} were removed; give the checkpoint that the record belongs to"
        )
    for place, block in enumerate(kept):
        for rest in sorted(ours[place].keys() & theirs[block].keys()):
            mine, other = (t[rest].shape for t in (ours[place], theirs[block]))
            if mine != other:
                raise InputError(
                    f"block {place} of {folder} has a {rest} of shape {list(mine)}, but block "
                    f"{block} of the teacher {name} has {list(other)}; give the original"
                )


def removal_by_weights(folder: Path, teacher: LoadedModel) -> tuple[int, ...]:
    """Find the removed blocks of a checkpoint, by comparing its blocks with the original's.

    Args:
        folder: the cut checkpoint.
        teacher: its original model, in memory.

    Raises:
        InputError: the blocks are not a subsequence of the original's, or no block is missing.
    """
    # On the CPU, so that the device needs memory for one model only.
    dtype = teacher.dtype_name
    trust = teacher.trusted
    student = load(folder, dtype=dtype, device="cpu", trust_remote_code=trust)
    ours, theirs = (stack_modules(m.model) for m in (student, teacher))
    kept: list[int] = []
    for place, block in enumerate(ours):
        first = kept[-1] + 1 if kept else 0
        same = next(
            (i for i in range(first, len(theirs)) if _same(block, theirs[i])), None
        )
        if same is None:
            after = f"after its block {kept[-1]}" if kept else "at all"
            raise InputError(
                f"{folder} has no {CUT}, and its block {place} is not a block of "
                f"{teacher.folder.name} {after}; expected a model without some blocks"
            )
        kept.append(same)
    removed = tuple(i for i in range(len(theirs)) if i not in kept)
    if not removed:
        raise InputError(
            f"{folder} has all blocks of {teacher.folder.name}; give a cut model"
        )
    return removed


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks have bitwise equal parameters."""
    a = dict(one.named_parameters())
    b = dict(other.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n].cpu()) for n in a)
